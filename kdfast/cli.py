"""The command line: each command is a module of kdfast.commands with a function `run(arguments)`.

A user's error is one sentence on stderr and exit status 1; a missing optional package is one sentence and status 2; Ctrl-C, SIGTERM and
SIGHUP save the run and leave with status 128 + signal. This file imports nothing heavy, so that `kdfast --help` answers at once.
"""

import difflib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

from kdfast.imports import MissingPackage, check_installed
from kdfast.text import printable
from kdfast.version import __version__

COMMANDS = {
    "teacher": "train a network on labels, to be a teacher",
    "distill": "distil a teacher into a small student, with a report",
    "compare": "several recipes on the same images, seeds and teacher, in one table",
    "eval": "accuracy, loss and confusion matrix of weights on a data set",
    "predict": "the most likely classes of image files",
    "export": "write a trained network as onnx, pt2 or safetensors",
    "report": "make a run's report again, or compare several runs",
    "data": "content of a data set, bad image files, a sheet of augmented images",
    "list": "recipes, presets, models or datasets",
    "bench": "speed on this machine: kernels, loaders, train, codegen; report",
}
MODULES = {"eval": "evaluate", "list": "listing"}  # where a command's module has another name
PACKAGES = ("torchvision", "sklearn", "scipy", "matplotlib", "rich", "tyro", "tomlkit", "jinja2")  # of the extra "cli"

OVERVIEW = """usage: kdfast COMMAND [options]

Knowledge distillation for PyTorch: teacher in, small accurate student out.

commands:
{commands}

kdfast distill                                       the handwritten digits, about two minutes on a laptop
kdfast distill --dataset PATH --teacher WEIGHTS ...  your own images
kdfast COMMAND --help                                every option of a command
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or a pipe that cannot show a letter
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with _leaving_at_once():
            command = _load(name)
        return command if isinstance(command, int) else _run(command, rest)
    except MissingPackage as error:
        return _fail(str(error), 2)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Within the block Ctrl-C ends the process: an exception would pass through the imports of libraries, some of which hide it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # the caller's handler stays
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"kdfast: stopped before anything was begun\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _load(name: str) -> ModuleType | int:
    """Returns the module of a command, or the exit status of what is no command."""
    if name in ("-h", "--help"):
        print(OVERVIEW.format(commands="\n".join(f"  {command:<9}{help}" for command, help in COMMANDS.items())))
        return 0
    if name == "--version":
        print(f"kdfast {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f"did you mean {near[0]}?" if near else f"known are {', '.join(COMMANDS)}"
        return _fail(f"there is no command {name!r}; {guess}")
    check_installed(PACKAGES, extra="cli", what=f"kdfast {name}")
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        importlib.import_module("kdfast.engine")
        return importlib.import_module(f"kdfast.commands.{MODULES.get(name, name)}")


def _run(command: ModuleType, arguments: Sequence[str]) -> int:
    """Runs a command; an error that a user can cause becomes a sentence and a status."""
    from kdfast.engine import Interrupted, NonFiniteLoss

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            command.run(arguments)
    except Interrupted as stop:
        return _fail(f"{stop}; the run is saved, continue with the same command and --resume", 128 + stop.signal_number)
    except KeyboardInterrupt:
        return _fail("stopped at once; what was saved before can be continued with --resume", 130)
    except NonFiniteLoss as error:
        return _fail(f"{error}; the last good checkpoint is kept. A smaller learning rate or --clip-norm may help")
    except BrokenPipeError:  # `kdfast list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", -1)):  # Windows has no EDQUOT
            return _fail(f"the disk is full or the file too large ({error.strerror}{where}); what was saved before is intact")
        return _fail(f"{error.strerror or error}{where}")
    except (ValueError, TypeError) as error:
        if os.environ.get("KDFAST_TRACEBACK"):
            raise
        return _fail(str(error))
    return 0


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """Prints a warning as one line; other libraries' notes about themselves are left out."""
    if issubclass(category, UserWarning):
        print(f"kdfast: warning: {printable(message)}", file=sys.stderr)


def _fail(sentence: str, status: int = 1) -> int:
    print(f"kdfast: {printable(sentence)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
