"""`ovsam demo`: open the demo in a browser."""

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ovsam.errors import InputError
from ovsam_cli import arguments


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PRESET|PATH|ID", default="auto", help="default: auto")
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="default: %(default)s, this machine only"
    )
    parser.add_argument("--port", metavar="N", type=arguments.count, default=7860, help="default: %(default)s")
    parser.add_argument("--share", action="store_true", help="also at a public address that Gradio lends")


def check(args: Namespace) -> None:
    """Refuse to start without the demo's files and Gradio, or at a port that cannot be."""
    if args.port > 65535:
        raise InputError(f"The port {args.port} does not exist; ports are numbers from 1 to 65535.")
    if _folder() is None:
        raise InputError(
            "The demo is not in this installation; `pip install --force-reinstall --no-deps ovsam` has it."
        )
    if importlib.util.find_spec("gradio") is None:
        raise InputError('The demo needs Gradio, which `pip install "ovsam[demo]"` brings.')


def run(args: Namespace) -> int:
    """Serve the demo until it is interrupted."""
    sys.path.insert(0, str(_folder()))  # its modules lie flat, as on a Space
    from app import main

    try:
        main(args.model, args.host, args.port, args.share)
    except OSError as error:
        raise InputError(f"The demo cannot be served at {args.host}:{args.port}; try another --port.") from error
    return 0


def _folder() -> Path | None:
    """The folder of the demo: a wheel carries it, and a checkout has it beside the package."""
    package = Path(__file__).parents[1] / "ovsam"
    return next((one for one in (package / "_demo", package.parent / "demo") if (one / "app.py").is_file()), None)
