"""From the words of a command line to a command's options."""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from kdfast import recipes
from kdfast.commands import config, toml
from kdfast.commands.config import Distill, Teach
from kdfast.text import printable

HELP = ("-h", "--help")


def parse(options: Any, arguments: Sequence[str], command: str, default: Any = None, description: str | None = None) -> Any:
    """Returns `options`, a dataclass, as the arguments fill it.

    Raises:
        ValueError: the dataclass refuses a value.
        SystemExit: the arguments do not fit or ask for help.
    """
    keywords = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(options, args=list(arguments), prog=f"kdfast {command}", description=description, **keywords)
    except SystemExit as stop:
        # tyro prints a box in place of the error of a dataclass that refuses its values: `arg` is the part's name then
        box = stop.__context__
        where, error = getattr(box, "arg", ""), box if isinstance(box, ValueError) else getattr(box, "__context__", None)
        if isinstance(where, str) and isinstance(error, ValueError):
            raise ValueError(f"{'teacher_training.' if 'teacher' in where else ''}{error}") from None
        if stop.code:
            print(printable(f"kdfast: {_describe_box(printed.getvalue())} (kdfast {command} --help)"), file=sys.stderr)
        raise


def _describe_box(box: str) -> str:
    """Tyro's error, paragraphs between rules in a box (without sides in a pipe that takes ASCII only), as one sentence."""
    rows = [row.strip(" │") for row in box.splitlines()]
    parts = [" ".join(part.split()) for part in re.split(r"^(?:[╭╰].*|[─-]{5,})$", "\n".join(rows), flags=re.MULTILINE)]
    text, more = "".join(parts[1:2] or parts).partition(" Got errors")[0], "".join(parts[2:3])
    text = re.sub(r"Error parsing (\S+): invalid literal for int\(\) with base 10:", r"\1 must be a whole number, got", text)
    text = re.sub(r"Error parsing (\S+): could not convert string to float:", r"\1 must be a number, got", text)
    near = re.findall(r"--[\w.-]+", more) if more.startswith("Perhaps") else []
    return text.rstrip(".") + (f"; did you mean {', '.join(near)}?" if near else "")


def take(arguments: Sequence[str], command: str, *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Returns the values of these options (None where absent), and the arguments without them."""
    usage = f"kdfast {command} --help"
    parser = argparse.ArgumentParser(prog=f"kdfast {command}", usage=usage, add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", dest=name.replace("-", "_"))
    try:
        return parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


Command = tuple[type, Callable[[Any], object]]  # its options and its function


def run_one_of(group: str, helps: Mapping[str, str], find: Callable[[str], Command], arguments: Sequence[str]) -> None:
    """Runs a command that has commands of its own, or lists them.

    Args:
        group: the command's name.
        helps: the purpose of each of its commands, by name.
        find: name -> command.
        arguments: the command line after the group.

    Raises:
        ValueError: there is no such command.
    """
    name, *rest = arguments or HELP
    if name in HELP:
        print(f"usage: kdfast {group} {'|'.join(helps)}\n")
        print("\n".join(f"  {command:<9}{help}" for command, help in helps.items()))
        return
    if name not in helps:
        raise ValueError(f"{group} knows {', '.join(helps)}, got {name!r}")
    options, function = find(name)
    function(parse(options, rest, f"{group} {name}"))


def resolve(command: Literal["teacher", "distill", "compare"], arguments: Sequence[str]) -> Teach | Distill[Any]:
    """Returns the configuration of a training command. Values come in five layers, each over those above it:

    layer          source                                                      example
    dataclasses    Distill, Teach and their parts                              temperature = 4.0
    data set       config.DATASETS[--dataset]                                  digits: epochs = 30
    preset         recipe.presets[--preset]                                    conkd, notebook: image_size = 224
    config.toml    --config FILE, or that of the run in --out with --resume    [training] epochs = 3
    command line   the options                                                 --epochs 5

    A preset that reproduces a source replaces the training of the data set's layer. In the layers of data set and preset a value of the
    student's training is the teacher's too, unless "teacher_training.<field>" is there as well.

    Raises:
        ValueError: an unknown recipe, preset or key, a value of another type, a recipe that contradicts config.toml's, code that only
            config.toml names, or an option of the command line that changes nothing.
        SystemExit: the options do not fit, or ask for help.
    """
    chosen = _peek(command, arguments)
    table, source = _read_config(chosen)
    for name in ("recipe", "preset"):
        here, there = chosen[name], table.get(name)
        if name in table and here not in (None, there):
            if not chosen["config"]:
                raise ValueError(toml.foreign(Path(chosen["out"]), [f"{name} is {there} there and {here} here"]))
            raise ValueError(f"{name} is {here} on the command line and {there} in {source}: give one")
    dataset = chosen["dataset"] or table.get("data", {}).get("dataset")
    default: Teach | Distill[Any]
    if command == "teacher":
        kind, words = Teach, Teach.__doc__
        default = config.teach_defaults(dataset)
    else:
        name = chosen["recipe"] or table.get("recipe", "conkd")
        _check_code([name], source, arguments)
        recipe = recipes.get(name)
        kind, words = Distill[recipe.settings], Distill.__doc__  # type: ignore[assignment,name-defined]
        default = config.defaults(recipe, chosen["preset"] or table.get("preset", "default"), dataset)
    default = toml.fill(default, table, source)
    _, options = take(arguments, command, "config")
    found = parse(kind, options, command, default, f"{words} With --config FILE, options that are not given come from a config.toml.")
    if isinstance(found, Teach):
        code = [found.model]
    else:
        code = [found.teacher_model, found.student, *getattr(found.method, "assistants", ())]
    _check_code(code, source, arguments)
    if command != "compare":  # there an option is for those recipes that use it
        config.check_effects(found, default)
    return found


def _check_code(names: Sequence[str], source: str, arguments: Sequence[str]) -> None:
    """Checks that code to import is named on the command line: a config.toml may be a stranger's."""
    for name in names:
        if ":" in name and not any(name in argument for argument in arguments):
            raise ValueError(f"{source} names {name}, which is not kdfast's: files import nothing, so name it on the command line too")


def _peek(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The few options that decide on the others' defaults, by name; None where absent."""
    plain = [argument.replace("_", "-") if argument.startswith("--") and "=" not in argument else argument for argument in arguments]
    resume = [argument for argument in plain if argument in ("--resume", "--no-resume")][-1:] == ["--resume"]
    names, _ = take(plain, command, "recipe", "preset", "dataset", "config", "out")
    return {**vars(names), "resume": resume}


def _read_config(chosen: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The table and the path of the config.toml: of --config, or of the run to resume; empty without either."""
    if chosen["config"]:
        return toml.read(Path(chosen["config"])), chosen["config"]
    if chosen["resume"] and chosen["out"]:
        path = toml.of_run(Path(chosen["out"]))
        try:
            return toml.read(path, sealed=True), str(path)
        except ValueError:
            if path.name == "config.toml":
                raise  # else half of it is there, and nothing else: the run begins with the options of the command line
    return {}, ""
