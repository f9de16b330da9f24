"""`ovsam demo`: open the demo in a browser."""

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ovsam.errors import InputError
from ovsam_cli import arguments

LESS_MEMORY = "use a smaller --model"


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add(parser, "--model")
    arguments.add_address(parser, port=7860)
    parser.add_argument("--share", action="store_true", help="also serve at a temporary public address of Gradio")


def check(args: Namespace) -> None:
    """Raise InputError without the demo's files or Gradio, or for an invalid port."""
    arguments.check_port(args.port)
    if _folder() is None:
        raise InputError(
            "The demo is not in this installation; `pip install --force-reinstall --no-deps ovsam` adds it."
        )
    if importlib.util.find_spec("gradio") is None:
        raise InputError('The demo needs Gradio; install it with `pip install "ovsam[demo]"`.')


def run(args: Namespace) -> int:
    """Serve the demo until it is interrupted."""
    sys.path.insert(0, str(_folder()))  # its modules are in one folder, as in a Space
    from app import main

    try:
        main(args.model, args.host, args.port, args.share)
    except OSError as error:
        raise InputError(f"The demo cannot be served at {args.host}:{args.port}; try another --port.") from error
    return 0


def _folder() -> Path | None:
    """Return the folder of the demo: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1] / "ovsam"
    return next((one for one in (package / "_demo", package.parent / "demo") if (one / "app.py").is_file()), None)
