"""The command line: `kdfast COMMAND --help` says the rest.

Errors of the user's making are one sentence on stderr and exit status 1; Ctrl-C and SIGTERM save the run and leave with 128 + signal.
"""

import argparse
import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "teacher": "train a network on labels, to be a teacher",
    "distill": "distil a teacher into a small student, with a report",
    "compare": "several recipes on the same images, seeds and teacher, in one table",
    "eval": "accuracy, loss and confusion matrix of weights on a data set",
    "predict": "the most likely classes of image files",
    "export": "write a trained network as onnx, pt2 or safetensors",
    "report": "make a run's report again, or compare several runs",
    "data": "what a data set holds, which files are bad, a sheet of augmented images",
    "list": "recipes, presets, models or datasets",
    "bench": "this machine's numbers: kernels, loaders, train, codegen; report",
}

OVERVIEW = """usage: kdfast COMMAND [options]

Knowledge distillation for PyTorch: teacher in, small accurate student out.

commands:
{commands}

kdfast distill                                       the handwritten digits, about two minutes on a laptop
kdfast distill --dataset PATH --teacher WEIGHTS ...  your own images
kdfast COMMAND --help                                every option of a command
"""

CONFIG = "With --config FILE a config.toml says what is not given here."

COMPARE = """usage: kdfast compare [--recipes a,b,c] [--out FOLDER] [options of kdfast distill]

Runs several recipes (none named, or all: every one) on the same images, student, seeds and teacher, which is trained once where none is
given, and writes FOLDER/comparison.html, .md and .json. The same command again continues what is left. A recipe of your own is named
package.module:RECIPE. Every option of `kdfast distill` that all these recipes have holds for all of them, for instance:

kdfast compare --recipes kd,lskd,conkd --seeds 3
kdfast compare --recipes all --dataset cifar10 --data-dir D --teacher WEIGHTS --teacher-model resnet56 --student resnet8 --epochs 30
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:<9}{what}" for name, what in COMMANDS.items())))
        return 0
    if arguments[0] == "--version":
        from kdfast.version import __version__

        print(f"kdfast {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f"did you mean {near[0]}?" if near else f"known are {', '.join(COMMANDS)}"
        return _fail(f"there is no command {name!r}; {guess}")
    return _guarded(lambda: _RUN[name](rest))


def _guarded(command: Callable[[], None]) -> int:
    """Runs a command; what a user can cause becomes a sentence and a status."""
    from kdfast.engine import Interrupted, NonFiniteLoss

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            command()
    except Interrupted as stop:
        print(f"kdfast: {stop}; the run is saved, continue with the same command and --resume", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        return _fail("stopped at once; what was saved before can be continued with --resume", 130)
    except NonFiniteLoss as error:
        return _fail(f"{error}; the last good checkpoint is kept. A smaller learning rate or --clip-norm may help")
    except BrokenPipeError:  # `kdfast list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"the disk is full or the file too large ({error.strerror}{_where(error)}); what was saved before is intact")
        return _fail(f"{error.strerror or error}{_where(error)}")
    except (ValueError, TypeError) as error:
        if os.environ.get("KDFAST_TRACEBACK"):
            raise
        return _fail(str(error))
    return 0


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    """A warning as one line; other libraries' notes about themselves are not the user's business."""
    if issubclass(category, UserWarning):
        print(f"kdfast: warning: {message}", file=sys.stderr)


def _where(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _fail(sentence: str, status: int = 1) -> int:
    print(f"kdfast: {sentence}", file=sys.stderr)
    return status


# ---- commands --------------------------------------------------------------------------------------------------------


_EPOCHS = ("epochs", "warmup")


def _parse(kind: Any, arguments: Sequence[str], name: str, default: Any = None, description: str | None = None) -> Any:
    import tyro

    keywords = {} if default is None else {"default": default}
    return tyro.cli(kind, args=list(arguments), prog=f"kdfast {name}", description=description, **keywords)


def _chosen(command: str, arguments: Sequence[str], *names: str) -> argparse.Namespace:
    """The few options that decide which others there are."""
    parser = argparse.ArgumentParser(prog=f"kdfast {command}", usage=f"kdfast {command} --help", add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    return parser.parse_known_args([a.replace("_", "-") if a.startswith("--") and "=" not in a else a for a in arguments])[0]


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments without `--option value` or `--option=value`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept


def _written(chosen: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The config.toml that options not given are taken from, and its path: the one named, or of the run that is resumed, or none."""
    from kdfast.commands import config

    if chosen.config:
        return config.read_toml(Path(chosen.config)), chosen.config
    if chosen.resume and chosen.out:
        path = config.of_run(Path(chosen.out))
        return config.read_toml(path), str(path)
    return {}, ""


def _distill(arguments: Sequence[str]) -> None:
    from kdfast.commands.distill import distill

    distill(_distillation("distill", arguments))


def _distillation(command: str, arguments: Sequence[str]) -> Any:
    """The configuration that these options of `kdfast distill` make."""
    from kdfast import recipes
    from kdfast.commands import config

    chosen = _chosen(
        "distill", arguments, "recipe", "preset", "dataset", "config", "out", *_EPOCHS, *(f"teacher-training.{name}" for name in _EPOCHS)
    )
    table, source = _written(chosen)
    for name in ("recipe", "preset"):
        here, there = getattr(chosen, name), table.get(name)
        if table and here not in (None, there):
            if not chosen.config:
                raise ValueError(config.foreign(Path(chosen.out), [f"{name} is {there} there and {here} here"]))
            raise ValueError(f"{name} is {here} on the command line and {there} in {source}: give one")
    recipe = recipes.get(chosen.recipe or table.get("recipe", "conkd"))
    preset = chosen.preset or table.get("preset", "default")
    default = config.defaults(recipe, preset, chosen.dataset or table.get("data", {}).get("dataset"))
    default = config.filled(default, config.with_epochs(table, vars(chosen)), source)
    kind = config.Distill[recipe.settings]  # type: ignore[name-defined]
    return _parse(kind, _without(arguments, "--config"), command, default, f"{config.Distill.__doc__} {CONFIG}")


def _compare(arguments: Sequence[str]) -> None:
    from kdfast import recipes
    from kdfast.commands.compare import compare

    if {"-h", "--help"} & set(arguments):
        print(COMPARE)
        return
    chosen = _chosen("compare", arguments, "recipes", "out")
    names = recipes.names() if chosen.recipes in (None, "all") else list(dict.fromkeys(chosen.recipes.split(",")))
    others = _without(_without(arguments, "--recipes"), "--out")
    for option in ("--recipe", "--config", "--resume"):
        if any(argument.split("=")[0] == option for argument in others):
            raise ValueError(f"compare does not take {option}: name the recipes with --recipes; the same command again continues the grid")
    configs: dict[str, Any] = {}
    for name in names:
        called = recipes.get(name).name
        if called == "teacher":
            raise ValueError(f"recipe {name} is called teacher, as the folder of the teacher that all share: rename it")
        if called in configs:
            raise ValueError(f"recipes {configs[called].recipe} and {name} are both called {called}: rename one")
        configs[called] = _distillation("compare", ["--recipe", name, *others])
    compare(configs, Path(chosen.out or "runs/comparison"))


def _teacher(arguments: Sequence[str]) -> None:
    from kdfast.commands import config
    from kdfast.commands.teacher import teach

    chosen = _chosen("teacher", arguments, "dataset", "config", "out", *_EPOCHS)
    table, source = _written(chosen)
    default = config.teach_defaults(chosen.dataset or table.get("data", {}).get("dataset"))
    default = config.filled(default, config.with_epochs(table, vars(chosen)), source)
    teach(_parse(config.Teach, _without(arguments, "--config"), "teacher", default, f"{config.Teach.__doc__} {CONFIG}"))


def _simple(module: str, options: str, function: str) -> Callable[[Sequence[str]], None]:
    def run(arguments: Sequence[str]) -> None:
        command = importlib.import_module(f"kdfast.commands.{module}")
        getattr(command, function)(_parse(getattr(command, options), arguments, {"evaluate": "eval"}.get(module, module)))

    return run


def _report(arguments: Sequence[str]) -> None:
    from kdfast import files, report

    parser = argparse.ArgumentParser(prog="kdfast report", description="Make a run's report again, or compare several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="page that compares several runs")
    options = parser.parse_args(arguments)
    if len(options.runs) > 1:
        files.check_writable(options.out, "--out")
    for run in options.runs:
        if not run.exists():
            raise ValueError(f"{run}: there is no such path")
        if not (run / "config.toml").exists():
            raise ValueError(f"{run} is not a run folder: there is no config.toml in it")
        print(report.write_report(run))
    if len(options.runs) > 1:
        print(report.write_comparison(options.runs, options.out))


def _list(arguments: Sequence[str]) -> None:
    from kdfast.commands import listing

    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: kdfast list recipes|models|datasets|presets")
        return
    listing.show(arguments[0])


def _several(name: str) -> Callable[[Sequence[str]], None]:
    """A command that has commands of its own; its module has an OVERVIEW and command(name) -> options, function."""

    def run(arguments: Sequence[str]) -> None:
        module = importlib.import_module(f"kdfast.commands.{name}")
        if not arguments or arguments[0] in ("-h", "--help"):
            print(module.OVERVIEW)
            return
        chosen, *rest = arguments
        options, function = module.command(chosen)
        function(_parse(options, rest, f"{name} {chosen}"))

    return run


_RUN: dict[str, Callable[[Sequence[str]], None]] = {
    "teacher": _teacher,
    "distill": _distill,
    "compare": _compare,
    "eval": _simple("evaluate", "Eval", "run_eval"),
    "predict": _simple("predict", "Predict", "predict"),
    "export": _simple("export", "Export", "export"),
    "report": _report,
    "data": _several("data"),
    "list": _list,
    "bench": _several("bench"),
}

if __name__ == "__main__":
    sys.exit(main())
