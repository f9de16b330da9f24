"""`ovsam train RECIPE`: one toml file in, one folder of weights out; killed at any moment, `--resume` goes on."""

import tomllib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ovsam.errors import InputError
from ovsam.scenes.drawing import SceneConfig

from .adapters_stage import AdaptersStage
from .clip_stage import ClipStage
from .data import SceneDataset
from .sam_stage import SamStage
from .texts import word_table

STAGES = {"clip": ClipStage, "sam": SamStage, "adapters": AdaptersStage}


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

    def _save(self, output_dir=None, state_dict=None):
        state = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor.contiguous() for name, tensor in state.items()})

    def log(self, logs, *args, **kwargs):
        logs.update({name: sum(values) / len(values) for name, values in self.running.items()})
        self.running.clear()
        super().log(logs, *args, **kwargs)


class LogFile(TrainerCallback):
    """Appends each log line to a jsonl file in the output folder."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        import json

        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def train_recipe(path, output=None, resume=False, steps=None, device=None) -> Path:
    recipe_path = Path(path)
    if not recipe_path.is_file():
        raise InputError(
            f"There is no recipe at {recipe_path}: pass the path of a recipe.toml, such as adapters/*/recipe.toml."
        )
    recipe = tomllib.loads(recipe_path.read_text())
    optim = recipe["optim"]
    folder = Path(output or Path("runs") / recipe_path.parent.name)
    folder.mkdir(parents=True, exist_ok=True)
    total = steps or optim["steps"]

    torch.manual_seed(recipe["seed"])
    stage_args = dict(recipe["stage_args"])
    if recipe["stage"] != "sam":
        stage_args["words"] = word_table()
    stage: nn.Module = STAGES[recipe["stage"]](**stage_args)
    if "weights" in recipe:  # go on from an earlier recipe's result
        stage.load_published(load_file(recipe["weights"]))
    data = SceneDataset(total * optim["batch_size"], recipe["seed"], SceneConfig(**recipe["data"]))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=optim["batch_size"],
        learning_rate=optim["learning_rate"],
        weight_decay=optim["weight_decay"],
        warmup_steps=optim["warmup_steps"],
        lr_scheduler_type="cosine",
        max_grad_norm=optim.get("max_grad_norm", 1.0),
        adam_beta2=0.98,
        logging_steps=optim.get("logging_steps", 50),
        save_steps=optim.get("save_steps", 500),
        save_total_limit=1,
        seed=recipe["seed"],
        dataloader_num_workers=0 if not torch.cuda.is_available() else 12,
        bf16=torch.cuda.is_available() and device != "cpu",
        use_cpu=device == "cpu",
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
    )
    trainer = StageTrainer(model=stage, args=arguments, train_dataset=data, callbacks=[LogFile(folder / "log.jsonl")])
    checkpoints = list(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=resume and bool(checkpoints))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in stage.published_state().items()}
    temporary = folder / "model.safetensors.part"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    return folder
