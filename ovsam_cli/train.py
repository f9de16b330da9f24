"""`ovsam train`: train what a recipe describes."""

from argparse import ArgumentParser, Namespace

from ovsam_cli import arguments


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, such as adapters/NAME/recipe.toml")
    parser.add_argument(
        "--data",
        metavar="COCO.json",
        nargs="+",
        help="one or several, instead of the recipe's data; goes with --images",
    )
    parser.add_argument(
        "--images", metavar="DIR", nargs="+", help="the folder of the pictures of --data, or one for each"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="instead of the recipe's, such as model.sam=facebook/sam2.1-hiera-large; may be repeated",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="where the result goes (default: runs/ and the recipe's folder)"
    )
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    parser.add_argument("--steps", metavar="N", type=arguments.count, help="instead of the recipe's number of steps")
    arguments.add_device(parser)


def run(args: Namespace) -> int:
    """Train what a recipe describes."""
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
