"""config.toml: a configuration as text, and back."""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomlkit

from kdfast import files
from kdfast.commands.config import FREE_ON_RESUME

C = TypeVar("C")
SEAL = "# checksum of the lines above: "


def dump(config: Any) -> str:
    """Returns the configuration, a dataclass, as TOML; None is written as an empty string."""
    return tomlkit.dumps(asdict(config, dict_factory=_plain))


def _plain(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: "" if value is None else str(value) if isinstance(value, Path) else value for name, value in items}


def fingerprint(config: Any) -> str:
    """Returns a text that changes with every option, except those that may change on resume and the places of images and teacher."""
    free = {*FREE_ON_RESUME, "dataset", "data_dir", "teacher"}
    options = asdict(config, dict_factory=lambda items: _plain([item for item in items if item[0] not in free]))
    return files.checksum(options)[:16]


def of_run(folder: Path) -> Path:
    """Returns the path of a run's config.toml, or of the one that a run was killed with while it wrote it.

    Raises:
        ValueError: there is no run in the folder.
    """
    path = folder / "config.toml"
    if not path.is_file():
        if partial := unfinished(folder):
            return partial
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise ValueError(f"--resume: {folder} {what}, so there is nothing to continue; without --resume a run begins there")
    return path


def unfinished(folder: Path) -> Path | None:
    """Returns the temporary config.toml of a run that was killed before it had another."""
    return next(folder.glob(".config.*.part.toml"), None) if not (folder / "config.toml").exists() else None


def seal(text: str) -> str:
    """Returns the text of a run's config.toml, whose last line is a checksum."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def read(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Reads the tables of a config.toml.

    Raises:
        ValueError: it cannot be read or is not TOML; or `sealed`, and it is not as a run wrote it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if sealed and seal(text.rpartition(SEAL)[0]) != text:
            raise ValueError(f"{path} is damaged or has been edited since its run began: put back what was there")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path} is no configuration: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no configuration: {error}") from None


def fill(config: C, table: Mapping[str, Any], source: str) -> C:
    """Returns `config` with a table's values over its own; an empty string is None where the field may be None.

    Raises:
        ValueError: a key that no field has, or a value of another type; `source` names the table.
    """
    hints = get_type_hints(type(config))
    known = {f.name for f in fields(config)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ValueError(f"{source}: there is no option {key!r}; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name in known:
        part = getattr(config, name)
        if is_dataclass(part):
            values[name] = fill(part, table.get(name, {}), f"{source} [{name}]")
        elif name in table:
            values[name] = _convert(table[name], hints[name], f"{source}: {name}")
    return replace(config, **values)  # type: ignore[type-var]


def _convert(value: Any, hint: Any, what: str) -> Any:
    """A TOML value as the type that the field has."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _convert(value, get_args(hint)[0], what)
    if origin in (Union, UnionType):
        return None if value == "" else _convert(value, next(a for a in get_args(hint) if a is not type(None)), what)
    if origin is Literal and value not in get_args(hint):
        raise ValueError(f"{what} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(v, get_args(hint)[0], what) for v in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is Literal or (isinstance(hint, type) and type(value) is hint):
        return value
    raise ValueError(f"{what} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Lists the options in which two configurations differ, except options that may change on resume."""
    found = []
    for f in fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if is_dataclass(a):
            found += differences(a, b, "teacher_training." if f.name == "teacher_training" else prefix)
        elif f.name not in FREE_ON_RESUME and a != b:
            found.append(f"{prefix}{f.name} is {b} there and {a} here")
    return found


def foreign(folder: Path, found: Sequence[str]) -> str:
    """Says that a run folder belongs to another configuration; `found` comes from differences()."""
    return f"run folder {folder} belongs to another configuration: {'; '.join(found[:5])}; give --out another folder"
