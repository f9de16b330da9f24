"""`ovsam train RECIPE`: one TOML file in, one folder of weights out; an interrupted run continues with `--resume`.

The loop is that of transformers.Trainer, so `accelerate launch -m ovsam_cli train ...` distributes it over GPUs and
machines (which must share the output folder), with accumulation, bfloat16 and a progress bar.
"""

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from ovsam.checkpoints.text_tower import embed_texts
from ovsam.data import SegmentationData, SharedWords
from ovsam.data.words import Word
from ovsam.errors import InputError
from ovsam.inference.loading import load
from ovsam.inference.segmenter import Segmenter
from ovsam.modeling.modeling_ovsam import OVSamModel
from ovsam.ops.arguments import accepted_arguments
from ovsam.ops.files import write_whole
from ovsam.ops.scores import plain_name
from ovsam.processing.vocabulary import Vocabulary
from ovsam.training.calibrate import calibrate_recipe
from ovsam.training.checkpoint import (
    SAVING,
    checkpoint_step,
    clear_saving,
    list_checkpoints,
    publish_checkpoint,
    write_model,
)
from ovsam.training.order import TrainingOrder, collate, mix_rehearsal, read_data
from ovsam.training.preflight import (
    check_trainable,
    check_workers,
    describe,
    first_sample,
    measure_memory,
    recompute_activations,
)
from ovsam.training.recipe import CALIBRATE, check_unchanged, read_recipe, record_recipe, weight_files
from ovsam.training.report import draw_curves, draw_samples
from ovsam.training.stages import STAGES
from ovsam.training.stages.text_embeddings import word_table
from ovsam.training.stages.towers import build_towers, text_embedder

DRAWN_SAMPLES = 8


def train_recipe(
    path: str | Path,
    output: str | Path | None = None,
    resume: bool = False,
    steps: int | None = None,
    device: str | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    settings: Sequence[str] = (),
) -> Path:
    """Train a recipe and write its weights.

    Args:
        path: path of a recipe.toml; adapters/README.md explains its tables.
        output: folder of the result; by default `runs/NAME`, where NAME is the folder of the recipe.
        resume: whether to continue from the last checkpoint in the output folder, if there is one.
        steps: number of steps, instead of the recipe's.
        device: "cpu" to train without a GPU.
        data, images: COCO JSON file and the folder of its images, or several, instead of the recipe's [data].
        settings: `KEY=VALUE` entries that replace those of the recipe, such as `model.sam=facebook/sam2.1-hiera-large`.

    Returns:
        the output folder: model.safetensors under the whole model's names, curves.png, and the last checkpoint, whose
        trainer_state.json holds the log.
        Where the recipe starts from a whole model, the folder is one: OVSamModel.from_pretrained(output) loads it, and
        its adapters lie in folders of their own.

    Raises:
        InputError: the recipe or the data are invalid, or the output folder has another run.
    """
    recipe = read_recipe(Path(path), steps, data, images, settings)
    folder = Path(output or Path("runs") / Path(path).parent.name)
    if recipe["stage"] == CALIBRATE:
        return calibrate_recipe(recipe, folder, device)
    arguments = _arguments(recipe, folder, device)  # sets the rank and the number of processes
    optim, main = recipe["optim"], arguments.process_index == 0
    samples = optim["steps"] * optim["batch_size"] * optim["accumulate"] * arguments.world_size

    torch.manual_seed(recipe["seed"])
    base = load(recipe["model"]["base"], device="cpu") if "base" in recipe.get("model", {}) else None
    size = base.model.sam.image_size if base is not None else None
    source = read_data(recipe["data"], recipe["seed"], samples, size)
    with arguments.main_process_first(local=False):
        if main:
            _prepare_folder(folder, recipe | {"found": _fingerprint(source, arguments.world_size)}, resume)
    checkpoints = list_checkpoints(folder)
    data, rehearsal, words = source, None, source.words
    share = recipe.get("rehearsal", {}).get("share", 0.0)
    if share:
        old = read_data(recipe["rehearsal"]["scenes"], recipe["seed"] + 1, math.ceil(samples * share), source.size)
        data, rehearsal, words = mix_rehearsal(source, old)
    held_out = _held_out(recipe, words, size)

    stage = _build_stage(recipe, words, base)
    if held_out is not None and not hasattr(stage, "predict"):
        raise InputError(
            f"The stage {recipe['stage']} measures no held-out images; remove [eval], and measure with `ovsam eval`."
        )
    check_trainable(stage, recipe["stage"])
    if optim["gradient_checkpointing"]:
        recompute_activations(stage)
    if hasattr(stage, "prepare"):  # features that a stage computes once for each image
        if rehearsal is not None and stage.cache:
            raise InputError(f"The stage {recipe['stage']} caches features of each image; remove [rehearsal].")
        data = stage.prepare(data, folder / "cache", json.dumps([recipe["data"], recipe["seed"]]))
    order = TrainingOrder(data, samples, recipe["seed"], source.pictures, rehearsal, share)
    trainer = StageTrainer(folder, words, model=stage, args=arguments, train_dataset=order, eval_dataset=held_out)
    memory = measure_memory(stage, collate([first_sample(order)]), trainer.accelerator.autocast)
    if main:
        print(describe(recipe, stage, source, memory, arguments.world_size))
        if held_out is not None:
            print(f"held out: {len(held_out):,} images, evaluated every {recipe['eval']['every']:,} steps")
        if checkpoints:
            print(f"resuming after step {checkpoint_step(checkpoints[-1]):,} of {optim['steps']:,}")
        sys.stdout.flush()  # before the progress bar
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if main:
        draw_curves(folder, trainer.state.log_history)
        if base is not None:
            base.model = stage.model  # the stage memory may have added one
            if "words" in accepted_arguments(STAGES[recipe["stage"]].__mro__):
                _add_words(base.model, [word.name for word in source.words])
            write_model(base, folder)
        else:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in stage.published_state().items()}
            write_whole(folder / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    trainer.accelerator.wait_for_everyone()
    return folder


def _add_words(model: OVSamModel, names: list[str]) -> None:
    """Record what a model was tuned for, beside what it was trained on before: words for questions without words, and
    the class names for which its Clip2SamAdapter outweighs CLIP, if it is one of those that blend."""
    known = model.config.vocabulary  # a list, the name of a built-in one, or none
    model.config.vocabulary = list(dict.fromkeys(names + (Vocabulary(known).labels if known else [])))
    if trained := getattr(model.config.clip2sam_config, "trained_words", ()):
        both = {*trained, *map(plain_name, names)}
        model.clip2sam.config.trained_words = model.config.clip2sam_config.trained_words = sorted(both)


def _fingerprint(data: SegmentationData, processes: int) -> dict[str, Any]:
    """Identify a run besides its recipe: the data in their current state, and the number of processes."""
    words = hashlib.sha256("\n".join(word.name for word in data.words).encode()).hexdigest()[:12]
    return {"processes": processes, "pictures": data.pictures, "instances": data.instances, "words": words}


def _arguments(recipe: dict, folder: Path, device: str | None) -> TrainingArguments:
    if device is not None and device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is not supported for training; use cpu or cuda.")
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: PyTorch finds no GPU; use `cpu`.")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1  # by accelerate or torchrun
    optim = recipe["optim"]
    workers = optim["workers"]
    if workers < 0:  # on a CPU, workers would share the cores of the model
        workers = min(12, os.cpu_count() or 1) if on_gpu else 0
    check_workers(workers)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=optim["steps"],
        per_device_train_batch_size=optim["batch_size"],
        gradient_accumulation_steps=optim["accumulate"],
        train_sampling_strategy="sequential",  # TrainingOrder defines the order
        learning_rate=optim["learning_rate"],
        weight_decay=optim["weight_decay"],
        warmup_steps=optim["warmup_steps"],
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        logging_steps=optim["logging_steps"],
        logging_nan_inf_filter=False,
        save_steps=optim["save_steps"],
        eval_strategy="steps" if "eval" in recipe else "no",
        eval_steps=recipe["eval"]["every"] if "eval" in recipe else None,
        seed=recipe["seed"],
        dataloader_num_workers=workers,
        bf16=on_gpu and optim["bf16"],
        use_cpu=not on_gpu,
        ddp_backend="gloo" if launched and not on_gpu else None,
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
    )


def _prepare_folder(folder: Path, recipe: dict, resume: bool) -> None:
    """Prepare the output folder for a new or a resumed run, without overwriting an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_saving(folder)
    checkpoints = list_checkpoints(folder)
    if not resume and (checkpoints or (folder / "model.safetensors").is_file()):
        raise InputError(f"{folder} already has a run; pass --resume to continue it, or another --output.")
    if checkpoints:
        check_unchanged(folder, recipe)
    record_recipe(folder, recipe)


def _held_out(recipe: dict, words: list[Word], size: int | None) -> Dataset | None:
    if "eval" not in recipe:
        return None
    data = read_data(recipe["eval"]["data"], recipe["seed"] + 2, recipe["eval"]["pictures"], size)
    if unknown := {word.name for word in data.words} - {word.name for word in words}:
        raise InputError(
            f"[eval.data] has class names that are not in the training data: {', '.join(sorted(unknown)[:5])}."
        )
    return Subset(SharedWords(data, words, data.max_objects), range(min(len(data), recipe["eval"]["pictures"])))


def _build_stage(recipe: dict, words: list[Word], base: Segmenter | None) -> nn.Module:
    """Build the stage with the arguments of its constructor: the table of words, the towers of [model], its base."""
    kind, given, model = STAGES[recipe["stage"]], dict(recipe["stage_args"]), recipe.get("model", {})
    accepted = accepted_arguments(kind.__mro__)
    if "words" in accepted:
        encode = _embedder(base) if base is not None else embed_texts
        if "clip" in model:
            encode = text_embedder(model["clip"], model.get("templates", ("{}",)))
        given["words"] = word_table(words, encode)
    if "towers" in accepted:
        given["towers"] = build_towers(model)
    if "model" in accepted and base is not None:
        if base.processor.clip_images is not None:
            raise InputError(
                f"In {model['base']} SAM and CLIP have different inputs; the stage {recipe['stage']} "
                "needs a model with one input."
            )
        given["model"] = base.model
    stage = kind(**given)
    if paths := weight_files(recipe):  # if several files have a tensor, the last one counts
        stage.load_published({name: tensor for path in paths for name, tensor in load_file(path).items()})
    return stage


def _embedder(segmenter: Segmenter):
    def embed(texts: list[str]) -> Tensor:
        unique = list(dict.fromkeys(texts))
        row = {text: i for i, text in enumerate(unique)}
        return segmenter.embed(unique)[1][torch.tensor([row[text] for text in texts])]

    return embed


def _callbacks(folder: Path) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = []
    if importlib.util.find_spec("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    return callbacks


class StageTrainer(Trainer):
    """transformers.Trainer with checkpoints that are complete or missing, held-out metrics of the stage, and running
    means of the metrics that a stage returns with its loss."""

    control: TrainerControl

    def __init__(self, folder: Path, words: list[Word], **kwargs):
        main = kwargs["args"].process_index == 0
        super().__init__(callbacks=_callbacks(folder) if main else [], data_collator=collate, **kwargs)
        self.folder, self.words = folder, [word.name for word in words]
        self.running: dict[str, list[Tensor]] = {}

    # ---- what is logged ---------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.running.setdefault(name, []).append(torch.as_tensor(value).detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                saved = list_checkpoints(self.folder)
                last = f"The last checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."
                raise InputError(
                    f"The loss became {logs['loss']} by step {self.state.global_step}; a smaller learning_rate or more "
                    f"warmup_steps may help. {last}"
                )
            logs.update({name: float(torch.stack(values).float().mean()) for name, values in self.running.items()})
            self.running.clear()
        super().log(logs, *args, **kwargs)

    # ---- held-out data ----------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Compute the metrics of the stage on the held-out images, distributed over the processes; then draw curves and
        samples. Its random numbers are the same every time, and those of training are not affected."""
        stage, device = self.model, self.args.device
        training = stage.training
        rank, world = self.args.process_index, self.args.world_size
        own = Subset(self.eval_dataset, range(rank, len(self.eval_dataset), world))
        sums: dict[str, tuple[float, int]] = {}
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(self.args.seed)
            stage.eval()
            for batch in DataLoader(own, self.args.train_batch_size, collate_fn=collate):
                with self.accelerator.autocast():
                    outputs = stage(**self._prepare_inputs(batch))
                for name, value in outputs.items():
                    total, count = sums.get(name, (0.0, 0))
                    sums[name] = total + float(value) * len(batch["image"]), count + len(batch["image"])
            merged: dict[str, list[tuple[float, int]]] = {}
            for part in gather_object([sums]):
                for name, pair in part.items():
                    merged.setdefault(name, []).append(pair)
            metrics = {f"eval_{n}": sum(t for t, _ in pairs) / sum(c for _, c in pairs) for n, pairs in merged.items()}
            self.log(metrics)
            if self.is_world_process_zero():
                draw_curves(self.folder, self.state.log_history)
                draw_samples(self.folder, self._predictions(stage), self.words)
            self.accelerator.wait_for_everyone()
        stage.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _predictions(self, stage) -> list[tuple[dict, tuple]]:
        rows = []
        for sample in Subset(self.eval_dataset, range(min(DRAWN_SAMPLES, len(self.eval_dataset)))):
            batch = self._prepare_inputs(collate([sample]))
            with self.accelerator.autocast():
                rows.append((sample, stage.predict(**batch)[0]))
        return rows

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial) -> str:
        return str(self.folder / SAVING)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)  # writes into SAVING
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish_checkpoint(self.folder, f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        """Save the tensors that training changes: trainable parameters, and buffers such as batch statistics."""
        if not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        frozen = {n for n, p in self.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        # safetensors does not support channels-last tensors.
        kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in frozen}
        save_file(kept, Path(output_dir) / "model.safetensors", metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        state = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        unexpected = self.model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise InputError(
                f"{resume_from_checkpoint} has {unexpected[0]}, which is not part of this stage; "
                "resume with the same recipe."
            )
