"""`ovsam train RECIPE`: one toml file in, one folder of weights out; stopped at any moment, `--resume` goes on.

The loop is transformers.Trainer's, so several GPUs, gradient accumulation and the progress bar come with it.
"""

import json
import tomllib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ovsam.errors import InputError
from ovsam.results import write_whole
from ovsam.scenes.drawing import SceneConfig

from .adapters_stage import AdaptersStage
from .clip_stage import ClipStage
from .data import SceneDataset
from .naming_stage import NamingStage
from .sam_stage import SamStage
from .texts import word_table

# A stage is a module whose forward takes a batch of SceneDataset and returns {"loss": ..., metric: ...}. All but
# `sam` learn words and are given them.
STAGES = {"clip": ClipStage, "adapters": AdaptersStage, "naming": NamingStage, "sam": SamStage}
STAGES_WITH_WORDS = ("clip", "adapters", "naming")


def train_recipe(
    path: str | Path,
    output: str | Path | None = None,
    resume: bool = False,
    steps: int | None = None,
    device: str | None = None,
) -> Path:
    """Train what a recipe describes and write its weights.

    Args:
        path: a recipe.toml with `stage`, `seed`, `[stage_args]`, `[data]` (a SceneConfig) and `[optim]`; optionally
            `weights`, an earlier result to go on from.
        output: folder of the result; default `runs/NAME`, NAME being the recipe's folder.
        resume: go on from the last checkpoint in the output folder, if there is one.
        steps: instead of the recipe's.
        device: "cpu" keeps off a GPU.

    Returns:
        the output folder: model.safetensors under the whole model's names, log.jsonl, the last checkpoint.

    Raises:
        InputError: no such recipe or stage, or weights the recipe starts from that are not there.
    """
    recipe = _read_recipe(Path(path))
    optim = recipe["optim"]
    folder = Path(output or Path("runs") / Path(path).parent.name)
    folder.mkdir(parents=True, exist_ok=True)
    total = steps or optim["steps"]

    torch.manual_seed(recipe["seed"])
    words = {"words": word_table()} if recipe["stage"] in STAGES_WITH_WORDS else {}
    stage: nn.Module = STAGES[recipe["stage"]](**words, **recipe["stage_args"])
    if "weights" in recipe:
        stage.load_published(load_file(recipe["weights"]))
    data = SceneDataset(total * optim["batch_size"], recipe["seed"], SceneConfig(**recipe["data"]))
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    print(f"stage {recipe['stage']}: {trained:,} parameters, {total} steps of {optim['batch_size']} pictures")

    on_gpu = torch.cuda.is_available() and device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=optim["batch_size"],
        learning_rate=optim["learning_rate"],
        weight_decay=optim["weight_decay"],
        warmup_steps=optim["warmup_steps"],
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        logging_steps=optim.get("logging_steps", 50),
        save_steps=optim.get("save_steps", 500),
        save_total_limit=1,
        seed=recipe["seed"],
        dataloader_num_workers=12 if on_gpu else 0,  # on a CPU the drawing shares the model's cores anyway
        bf16=on_gpu,
        use_cpu=not on_gpu,
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
    )
    trainer = StageTrainer(model=stage, args=arguments, train_dataset=data, callbacks=[LogFile(folder / "log.jsonl")])
    trainer.train(resume_from_checkpoint=resume and any(folder.glob("checkpoint-*")))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in stage.published_state().items()}
    write_whole(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    return folder


def _read_recipe(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"There is no recipe at {path}; pass the path of a recipe.toml, such as one of adapters/.")
    try:
        recipe = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not a toml file: {error}.") from error
    if missing := {"stage", "seed", "stage_args", "data", "optim"} - recipe.keys():
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; the recipes of adapters/ show what is needed.")
    if recipe["stage"] not in STAGES:
        raise InputError(f"{path} asks for the stage {recipe['stage']!r}; there are {', '.join(STAGES)}.")
    arguments = recipe["stage_args"]
    for needed in (recipe.get("weights"), *(v for k, v in arguments.items() if k.endswith("_weights"))):
        if needed and not Path(needed).is_file():
            raise InputError(f"{path} starts from {needed}, which is not there; train that recipe first.")
    return recipe


class StageTrainer(Trainer):
    """transformers.Trainer that also logs the running means of whatever a stage returns beside its loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.running: dict[str, list[float]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.running.setdefault(name, []).append(float(value))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        logs.update({name: sum(values) / len(values) for name, values in self.running.items()})
        self.running.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        # safetensors takes no channels-last tensors.
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor.contiguous() for name, tensor in state.items()})


class LogFile(TrainerCallback):
    """Appends each log line to a jsonl file."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
