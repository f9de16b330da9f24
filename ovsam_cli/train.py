"""`ovsam train`: train a model or an adapter by a recipe."""

import tomllib
from argparse import ArgumentParser, Namespace

from ovsam.errors import InputError
from ovsam.ops.schema import read_text
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
    """Raise InputError for a missing recipe, one that is not TOML, or invalid --data and --set."""
    if (args.data is None) != (args.images is None):
        raise InputError("--data and --images go together: a COCO JSON file, and the folder of its images.")
    for setting in args.settings:
        if not setting.partition("=")[1]:
            raise InputError(f"--set {setting} cannot be read; write KEY=VALUE, such as optim.learning_rate=1e-4.")
    try:
        tomllib.loads(read_text(args.recipe, "recipe"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{args.recipe} is not a TOML file: {error}.") from error


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
