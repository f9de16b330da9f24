"""Recipes: recipe.toml is read, completed with defaults, overridden by the command line, and compared between runs."""

import copy
import inspect
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ovsam.errors import InputError
from ovsam.ops.arguments import accepted_arguments
from ovsam.ops.files import write_text
from ovsam.training.stages import STAGES

CALIBRATE = "calibrate"  # the only stage that is not gradient-based (calibrate.py)
NEEDED = ("stage", "seed", "data")
# The keys of each section with their defaults; None: required. The keys of [data] and [stage_args] are those of the
# reader and of the stage.
SECTIONS: dict[str, dict[str, Any]] = {
    "optim": {
        "batch_size": None,  # for each process
        "steps": None,
        "learning_rate": None,
        "weight_decay": 0.05,
        "warmup_steps": 0,
        "accumulate": 1,  # number of batches of one step
        "save_steps": 500,
        "logging_steps": 50,
        "workers": -1,  # processes that read images; -1: none on a CPU, up to 12 with a GPU
        "bf16": True,  # on a GPU only
        "gradient_checkpointing": False,
    },
    "eval": {"every": None, "data": None, "pictures": 64},
    "rehearsal": {"share": 0.25, "scenes": {}},  # only where a recipe has the table; scenes: a SceneConfig
}
CALIBRATION = {"pictures": 60, "absent": 0.03, "temperature": True, "novel": 0}  # the [stage_args] of calibrate
MAY_BE_ZERO = {"weight_decay", "warmup_steps", "share", "workers", "absent", "novel"}
TOP_LEVEL = {"stage", "seed", "data", "stage_args", "weights", "model", *SECTIONS}
# Keys that may differ between a run and its continuation, since they change no weights.
HARMLESS = ("optim.save_steps", "optim.logging_steps", "optim.workers", "eval.")
RECORD = "recipe.json"


def read_recipe(
    path: Path,
    steps: int | None = None,
    data: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    images: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Read a recipe and fill in the defaults.

    Args:
        steps: number of steps, instead of the recipe's.
        data, images: COCO JSON file and the folder of its images, instead of the recipe's [data]; or several files, and
            one folder for all of them or one for each. Their samples are mixed in equal shares.
        settings: `KEY=VALUE` entries that replace those of the recipe, such as `model.sam=facebook/sam2.1-hiera-large`.

    Raises:
        InputError: the recipe, its stage or a key is unknown, a key is missing, or weights to start from do not exist.
    """
    if not path.is_file():
        raise InputError(f"There is no recipe at {path}; pass the path of a recipe.toml, such as one of adapters/.")
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    for setting in settings:
        _set(recipe, setting)
    if (data is None) != (images is None):
        raise InputError("--data and --images go together: a COCO JSON file, and the folder of its images.")
    if data is not None:
        own = {k: v for k, v in recipe.get("data", {}).items() if k not in ("format", "annotations", "images")}
        own = own if recipe.get("data", {}).get("format") == "coco" else {}
        jsons, folders = (
            [str(one)] if isinstance(one, str | os.PathLike) else [str(path) for path in one] for one in (data, images)
        )
        if len(folders) not in (1, len(jsons)):
            raise InputError(
                f"There are {len(jsons)} --data and {len(folders)} --images; give one folder, or one each."
            )
        folders *= len(jsons) if len(folders) == 1 else 1
        sets = [
            {**own, "format": "coco", "annotations": json, "images": folder}
            for json, folder in zip(jsons, folders, strict=True)
        ]
        recipe["data"] = sets[0] if len(sets) == 1 else {"format": "mixture", "sets": sets}
    if missing := [key for key in NEEDED if key not in recipe]:
        raise InputError(f"{path} lacks {', '.join(missing)}; the recipes of adapters/ show what is needed.")
    if unknown := recipe.keys() - TOP_LEVEL:
        raise InputError(f"{path} has {', '.join(sorted(unknown))}; a recipe takes {', '.join(sorted(TOP_LEVEL))}.")
    if recipe["stage"] not in (*STAGES, CALIBRATE):
        raise InputError(f"{path} has the stage {recipe['stage']!r}; choose one of {', '.join((*STAGES, CALIBRATE))}.")
    recipe.setdefault("stage_args", {})
    for name, defaults in SECTIONS.items():
        if name in recipe or (name == "optim" and recipe["stage"] != CALIBRATE):
            recipe[name] = _complete(path, name, recipe.get(name, {}), defaults, steps)
    if recipe["stage"] == CALIBRATE:
        recipe["stage_args"] = _complete(path, "stage_args", recipe["stage_args"], CALIBRATION, None)
        if "base" not in recipe.get("model", {}):
            raise InputError(f"{path} lacks base in [model]: a preset, a folder or a Hub id of the model to calibrate.")
    _check_start(path, recipe)
    return recipe


def _set(recipe: dict, setting: str) -> None:
    """Set `table.key=value`; the value is TOML, or else a string."""
    name, equals, value = setting.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not all((*tables, key)):
        raise InputError(f"--set {setting} cannot be read; write KEY=VALUE, such as optim.learning_rate=1e-4.")
    for table in tables:
        recipe = recipe.setdefault(table, {})
        if not isinstance(recipe, dict):
            raise InputError(f"--set {setting}: {table} is a value in the recipe, not a table.")
    try:
        recipe[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        recipe[key] = value.strip()


def _complete(path: Path, name: str, given: dict, defaults: dict, steps: int | None) -> dict:
    if unknown := given.keys() - defaults.keys():
        known = ", ".join(sorted(defaults))
        raise InputError(f"{path} has {', '.join(sorted(unknown))} in [{name}], which takes {known}.")
    section = copy.deepcopy(defaults) | given
    if name == "optim" and steps is not None:
        section["steps"] = steps
    if missing := [key for key, value in section.items() if value is None]:
        raise InputError(f"{path} lacks {', '.join(missing)} in [{name}].")
    for key, value in section.items():
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if numeric and key != "workers" and (value < 0 or value == 0 and key not in MAY_BE_ZERO):
            raise InputError(f"{path} has {key} = {value} in [{name}]; it must be more than 0.")
    return section


def _check_start(path: Path, recipe: dict) -> None:
    """Check that the stage takes its arguments, and that the weights it starts from exist."""
    given, model = recipe["stage_args"], recipe.get("model", {})
    if recipe["stage"] != CALIBRATE:
        accepted = accepted_arguments(STAGES[recipe["stage"]].__mro__)
        built = {"words", "towers"} | ({"model"} if "base" in model else set())  # these the engine makes
        names = accepted.keys() - built
        if unknown := given.keys() - names:
            takes = ", ".join(sorted(names)) or "none"
            raise InputError(
                f"{path} has {', '.join(sorted(unknown))} in [stage_args]; the stage {recipe['stage']} takes {takes}."
            )
        missing = {n for n in names if accepted[n].default is inspect.Parameter.empty} - given.keys()
        if missing == {"model"}:
            raise InputError(f"{path} lacks base in [model]: a preset, a folder or a Hub id of the model to fine-tune.")
        if missing:
            raise InputError(f"{path} lacks {', '.join(sorted(missing))} in [stage_args].")
        if "towers" in accepted and not model:
            raise InputError(f"{path} lacks [model]: the towers that the stage {recipe['stage']} needs.")
    named = [value for key, value in given.items() if key.endswith("weights") and value]
    for file in (*weight_files(recipe), *named):
        if not Path(file).is_file():
            raise InputError(f"{path} starts from {file}, which does not exist; train that recipe first.")


def weight_files(recipe: dict[str, Any]) -> list[str]:
    """Return the files in the recipe's `weights`: one or several."""
    paths = recipe.get("weights", [])
    return [paths] if isinstance(paths, str) else list(paths)


def _flat(section: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def record_recipe(folder: Path, recipe: dict) -> None:
    """Store the recipe in the output folder, so that a continuation can be compared with it."""
    write_text(folder / RECORD, json.dumps(recipe, indent=1, sort_keys=True) + "\n")


def check_unchanged(folder: Path, recipe: dict) -> None:
    """Raise InputError with the differences unless the run in the folder has the same recipe and data."""
    record = folder / RECORD
    if not record.is_file():
        raise InputError(f"{folder} has a checkpoint but no {RECORD}, which describes its run; use another --output.")
    before, now = dict(_flat(json.loads(record.read_text()))), dict(_flat(json.loads(json.dumps(recipe))))
    changed = [
        f"{key} was {before.get(key, 'not set')!r} and is {now.get(key, 'not set')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(HARMLESS)
    ]
    if changed:
        raise InputError(
            f"The run in {folder} cannot be resumed with another recipe: {'; '.join(changed)}. "
            "Undo the changes, or start a new run with another --output."
        )
