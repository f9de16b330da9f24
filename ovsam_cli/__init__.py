"""The command line `ovsam`: one module a command, imported when it is called.

A command module has `add_arguments(parser)` and `run(args)`, which returns the exit code. Optional are keywords of its
parser, `PARSER`; `check(args)`, which raises InputError for invalid input and may replace values of `args`; and
`LESS_MEMORY`, what a user can do when memory runs out. torch, and modules that need it, are imported in `run` only, so
that help and errors appear at once; a command whose run needs no torch either has `LIGHT = True`.
"""

# ruff: noqa: E402, I001
import os
import signal
import sys


def _exit_at_once(number, frame):
    os._exit(130)


# Ctrl-C ends a command without a traceback, also during the imports below and after `main`, which has its own handler.
# As `python -m ovsam_cli`, argv[0] is still "-m" here; only this thread can be the main one of a program that starts.
if sys.argv[:1] == ["-m"] or sys.argv[:1] and sys.argv[0].endswith(("/ovsam", "\\ovsam.exe")):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)

import argparse
import contextlib
import difflib
import errno
import importlib
import importlib.util
import io
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

COMMANDS = {
    "segment": "segment objects in images: by text queries, points or boxes, or all of them",
    "video": "track objects through a video",
    "label": "label many images, for labelling and training tools",
    "eval": "evaluate a model on a data set",
    "models": "list the presets: parts, licences, sizes, and whether they are downloaded",
    "convert-labels": "convert label files between formats",
    "label-studio": "serve predictions to Label Studio",
    "compose": "compose a model from a SAM, a CLIP and adapters",
    "convert": "convert an official checkpoint to a folder that transformers loads",
    "export": "export a model to ONNX, which runs without torch",
    "compare": "compare a fine-tuned model with its base on a data set",
    "push": "publish a model or an adapter on the Hugging Face Hub",
    "demo": "open the demo in a browser",
    "train": "train a model or an adapter by a recipe",
}


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
LESS_MEMORY = "use smaller images or a smaller model"

_bare: set[str] = set()  # packages imported without running their __init__


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = " ".join(message.splitlines())
        self.exit(2, f"ovsam: error: {message} (see `{self.prog} --help`)\n")

    def parse_args(self, *args, **named):
        found = super().parse_args(*args, **named)
        for action in self._actions:  # an unset variable of a shell, -o "$OUT"
            if getattr(found, action.dest, None) == "":
                self.error(f"The argument {'/'.join(action.option_strings) or action.metavar} is empty")
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1 if a part of a batch failed; 2 for invalid input; 130 on Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be UTF-8
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")
    with _interruptions() as noted:
        try:
            code = _print(argv)
        except KeyboardInterrupt:
            return 130
        except Exception:
            if not noted:
                raise
    return 130 if noted else code


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Note each Ctrl-C, since libraries turn KeyboardInterrupt into other errors, or go on after it."""
    noted: list[int] = []

    def note(number, frame):
        noted.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()  # only it may set handlers
    before = signal.getsignal(signal.SIGINT)
    if not main_thread or before not in (signal.default_int_handler, _exit_at_once):
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _print(argv: list[str]) -> int:
    """Run the command; an output that cannot be written is one sentence."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else the interpreter would flush it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail("The output cannot be written: its reader has closed the pipe; keep the reader running.")
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename:
            raise
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"The output cannot be written ({error.strerror}).")


def _run(argv: list[str]) -> int:
    name, rest = _choose_command(argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are for terminals; tqdm reads it when it is imported
    _import_bare("ovsam")
    from ovsam.errors import InputError, is_out_of_memory

    command = importlib.import_module(f"ovsam_cli.{name.replace('-', '_')}")
    parser = Parser(
        prog=f"ovsam {name}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **{"description": f"{COMMANDS[name].capitalize()}."} | getattr(command, "PARSER", {}),
    )
    command.add_arguments(parser)
    args = parser.parse_args(_join_coordinates(rest))
    try:
        if hasattr(command, "check"):
            command.check(args)
        if not getattr(command, "LIGHT", False):
            _finish_import("ovsam")
            _quieten(getattr(args, "verbose", False), getattr(args, "quiet", False))
        return command.run(args)
    except InputError as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"There is not enough memory; {getattr(command, 'LESS_MEMORY', LESS_MEMORY)}.")


def _quieten(verbose: bool, quiet: bool) -> None:
    """Let transformers report errors only, and show progress on a terminal only."""
    from transformers.utils import logging

    if not verbose:
        logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def _fail(message: str) -> int:
    with contextlib.suppress(OSError):  # stderr may be closed as well
        print(f"ovsam: error: {message}", file=sys.stderr, flush=True)
    return 2


def _choose_command(argv: list[str]) -> tuple[str, list[str]]:
    """Return the command and its arguments; exits for help, the version, and unknown commands."""
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog="ovsam",
        usage="ovsam [-h] [--version] COMMAND ...",
        description="Open-vocabulary segmentation.",
        epilog="commands (`ovsam COMMAND --help` describes one):\n"
        + "\n".join(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ovsam {_read_version()}")
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            parser.error(f"There is no command {argv[0]!r}" + (f"; did you mean `{close[0]}`?" if close else "."))
        return argv[0], argv[1:]
    if argv:
        parser.parse_args(argv)
    parser.print_help()
    parser.exit(0)


def _import_bare(name: str) -> None:
    """Allow imports of modules of a package without running its `__init__`, see `_finish_import`.

    `ovsam/__init__.py` registers its classes with transformers, which takes seconds, while the modules that check user
    input need neither transformers nor torch.
    """
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        _bare.add(name)


def _finish_import(name: str) -> None:
    """Run the `__init__` of a package that was imported by `_import_bare`."""
    if name in _bare:
        _bare.remove(name)
        package = sys.modules[name]
        package.__spec__.loader.exec_module(package)


def _read_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("ovsam")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _join_coordinates(argv: Sequence[str]) -> list[str]:
    """Replace `--point -5,3` by `--point=-5,3`, since argparse takes -5,3 for an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--point", "--box"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


if __name__ == "__main__":
    sys.exit(main())
