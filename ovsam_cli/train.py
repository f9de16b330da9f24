"""`ovsam train`: train a model or an adapter by a recipe."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ovsam.errors import InputError
from ovsam.ops.files import check_output_folder
from ovsam.training.recipe import check_quickly, parse_recipe
from ovsam_cli import arguments

LESS_MEMORY = "use --set optim.batch_size=1 with a larger optim.accumulate, or --set optim.gradient_checkpointing=true"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="recipe file, such as adapters/NAME/recipe.toml")
    parser.add_argument(
        "--data",
        metavar="COCO.json",
        nargs="+",
        help="one or several files, instead of the recipe's data; needs --images",
    )
    parser.add_argument("--images", metavar="DIR", nargs="+", help="folder of the images of --data, or one for each")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="value instead of the recipe's, such as model.sam=facebook/sam2.1-hiera-large; may be repeated",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the result (default: runs/NAME, with the name of the recipe's folder)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--steps", metavar="N", type=arguments.count, help="number of steps, instead of the recipe's")
    arguments.add(parser, "--device")


def check(args: Namespace) -> None:
    """Raise InputError for invalid recipes, data, --set and --output."""
    for file in args.data or ():
        if not os.path.isfile(file):
            raise InputError(f"There is no file {file}; --data must be a COCO JSON file.")
    for folder in args.images or ():
        if not os.path.isdir(folder):
            raise InputError(f"There is no folder {folder}; --images must be the folder of the images.")
    if args.output:
        check_output_folder(args.output, "--output")
    recipe = Path(args.recipe)
    check_quickly(recipe, parse_recipe(recipe, args.steps, args.data, args.images, args.settings))


def run(args: Namespace) -> int:
    """Train a recipe."""
    from ovsam.training.engine import train_recipe

    train_recipe(
        args.recipe,
        output=args.output,
        resume=args.resume,
        steps=args.steps,
        device=args.device,
        data=args.data,
        images=args.images,
        settings=args.settings,
    )
    return 0
