"""Recipes: recipe.toml is read, completed with defaults, overridden by the command line, and compared between runs."""

import inspect
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ovsam.errors import InputError
from ovsam.ops.arguments import accepted_arguments, check_arguments
from ovsam.ops.files import write_text
from ovsam.ops.schema import Share, checked, read_json, read_text
from ovsam.processing.arguments import short
from ovsam.results.formats.coco_tables import check_tables

CALIBRATE = "calibrate"  # the only stage that is not gradient-based (calibrate.py)
# The names in `stages.STAGES` and `data.READERS`, which need torch.
STAGE_NAMES = ("clip", "sam", "sam2clip", "clip2sam", "concepts", "adapters", "mae", "finetune", "memory")
FORMATS = ("emojiscenes", "coco", "lvis", "sa1b", "folders", "huggingface", "mixture", "moving")
Count = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
CountOrNone = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Table = dict[str, Any]


class Optim(msgspec.Struct, kw_only=True):
    batch_size: Count  # for each process
    steps: Count
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    weight_decay: Amount = 0.05
    warmup_steps: CountOrNone = 0
    accumulate: Count = 1  # number of batches of one step
    save_steps: Count = 500
    logging_steps: Count = 50
    # Processes that read images; -1: none on a CPU, up to 12 with a GPU.
    workers: Annotated[int, msgspec.Meta(ge=-1, le=2**20)] = -1
    bf16: bool = True  # on a GPU only
    gradient_checkpointing: bool = False


class Eval(msgspec.Struct, kw_only=True):
    every: Count
    data: Table
    pictures: Count = 64


class Rehearsal(msgspec.Struct, kw_only=True):
    share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.25
    scenes: Table = {}  # a SceneConfig


class Calibration(msgspec.Struct, kw_only=True):
    """The [stage_args] of calibrate."""

    pictures: Count = 60
    absent: Share = 0.03
    temperature: bool = True
    novel: CountOrNone = 0


class Recipe(msgspec.Struct, kw_only=True):
    """The tables of a recipe. The keys of [data] and [stage_args] are those of the reader and of the stage."""

    stage: str
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    data: Table
    stage_args: Table = {}
    weights: str | list[str] | msgspec.UnsetType = msgspec.UNSET
    model: Table | msgspec.UnsetType = msgspec.UNSET
    optim: Optim | msgspec.UnsetType = msgspec.UNSET
    eval: Eval | msgspec.UnsetType = msgspec.UNSET
    rehearsal: Rehearsal | msgspec.UnsetType = msgspec.UNSET


TABLES: dict[str, Any] = {"optim": Optim, "eval": Eval, "rehearsal": Rehearsal}
# Keys that may differ between a run and its continuation, since they change no weights.
HARMLESS = ("optim.save_steps", "optim.logging_steps", "optim.workers", "eval.")
RECORD = "recipe.json"


Paths = str | os.PathLike | Sequence[str | os.PathLike] | None


def read_recipe(
    path: Path, steps: int | None = None, data: Paths = None, images: Paths = None, settings: Sequence[str] = ()
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
    recipe = parse_recipe(path, steps, data, images, settings)
    _check_start(path, recipe)
    return recipe


def parse_recipe(
    path: Path, steps: int | None = None, data: Paths = None, images: Paths = None, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """`read_recipe` without the checks of the stage, which need torch."""
    if not os.path.isfile(path):
        raise InputError(f"There is no recipe at {path}; pass the path of a recipe.toml, such as one of adapters/.")
    try:
        recipe = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    for setting in settings:
        _set(recipe, setting)
    if (data is None) != (images is None):
        raise InputError("--data and --images go together: a COCO JSON file, and the folder of its images.")
    if data is not None:
        own = checked(recipe.get("data", {}), Table, str(path), "data")
        kept = own if own.get("format") == "coco" else {}
        own = {k: v for k, v in kept.items() if k not in ("format", "annotations", "images")}
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
    return _checked(path, recipe, steps)


def check_quickly(path: Path, recipe: dict[str, Any]) -> None:
    """Find, without torch, what would otherwise be found when the stage and the data are opened: an unknown stage or
    format, weights, folders and files that do not exist, and annotations that cannot be read."""
    _check_stage(path, recipe, STAGE_NAMES)
    _check_weights(path, recipe)
    tables = [recipe["data"], recipe.get("eval", {}).get("data", {})]
    while tables:
        table = tables.pop()
        kind = table.get("format", FORMATS[0])
        if kind not in FORMATS:
            raise InputError(f"[data] has the format {short(kind)}; choose one of {', '.join(FORMATS)}.")
        if kind == "mixture":
            sets = table.get("sets")
            tables += [own for own in sets if isinstance(own, dict)] if isinstance(sets, list) else []
        for key in ("folder", "images"):
            if isinstance(table.get(key), str) and not os.path.isdir(table[key]):
                raise InputError(f"There is no folder {table[key]}; `{key}` must be the folder of the images.")
        if isinstance(table.get("annotations"), str):
            check_tables(table["annotations"], table.get("images"))


def _checked(path: Path, recipe: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """Return a recipe with all defaults; raises InputError for unknown and missing keys and for wrong values."""
    fields = Recipe.__struct_fields__
    if missing := [key for key in Recipe.__struct_fields__[:3] if key not in recipe]:
        raise InputError(f"{path} lacks {', '.join(missing)}; the recipes of adapters/ show what is needed.")
    if unknown := recipe.keys() - set(fields):
        raise InputError(f"{path} has {', '.join(sorted(unknown))}; a recipe takes {', '.join(sorted(fields))}.")
    if not isinstance(recipe["stage"], str):
        raise InputError(f"{path} has the stage {short(recipe['stage'])}; it must be the name of one.")
    if recipe["stage"] != CALIBRATE:
        optim = checked(recipe.get("optim", {}), Table, str(path), "optim")
        recipe["optim"] = optim if steps is None else optim | {"steps": steps}
    for name, table in TABLES.items():
        _check_keys(path, name, recipe.get(name, {}), table)
    recipe = msgspec.to_builtins(checked(recipe, Recipe, str(path)))
    if recipe["stage"] == CALIBRATE:
        _check_keys(path, "stage_args", recipe["stage_args"], Calibration)
        recipe["stage_args"] = msgspec.to_builtins(checked(recipe["stage_args"], Calibration, str(path), "stage_args"))
        if "base" not in recipe.get("model", {}):
            raise InputError(f"{path} lacks base in [model]: a preset, a folder or a Hub id of the model to calibrate.")
    return recipe


def _check_keys(path: Path, name: str, given: Any, table: Any) -> None:
    fields = {field.name: field.required for field in msgspec.structs.fields(table)}
    if not isinstance(given, dict):
        return  # the schema describes it
    if unknown := given.keys() - fields.keys():
        known = ", ".join(sorted(fields))
        raise InputError(f"{path} has {', '.join(sorted(unknown))} in [{name}], which takes {known}.")
    if given and (missing := [key for key, required in fields.items() if required and key not in given]):
        raise InputError(f"{path} lacks {', '.join(missing)} in [{name}].")


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


def _check_start(path: Path, recipe: dict) -> None:
    """Check that the stage exists and takes its arguments, and that the weights it starts from exist."""
    from ovsam.training.stages import STAGES

    _check_stage(path, recipe, STAGES)
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
        check_arguments(given, STAGES[recipe["stage"]].__mro__, f"[stage_args] of {path}")
        missing = {n for n in names if accepted[n].default is inspect.Parameter.empty} - given.keys()
        if missing == {"model"}:
            raise InputError(f"{path} lacks base in [model]: a preset, a folder or a Hub id of the model to fine-tune.")
        if missing:
            raise InputError(f"{path} lacks {', '.join(sorted(missing))} in [stage_args].")
        if "towers" in accepted and not model:
            raise InputError(f"{path} lacks [model]: the towers that the stage {recipe['stage']} needs.")
    _check_weights(path, recipe)


def _check_stage(path: Path, recipe: dict, stages: Iterable[str]) -> None:
    if recipe["stage"] not in (known := (*stages, CALIBRATE)):
        raise InputError(f"{path} has the stage {short(recipe['stage'])}; choose one of {', '.join(known)}.")


def _check_weights(path: Path, recipe: dict) -> None:
    given = recipe["stage_args"].items()
    named = [value for key, value in given if key.endswith("weights") and value and isinstance(value, str)]
    for file in (*weight_files(recipe), *named):
        if not os.path.isfile(file):
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
    before, now = dict(_flat(read_json(record, Table))), dict(_flat(json.loads(json.dumps(recipe))))
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
