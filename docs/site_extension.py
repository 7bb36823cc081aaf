"""Sphinx extension of this site: tables from the recipes' own settings, and docstrings in plain text made reStructuredText.

    ```{recipe-options} kd
    ```
    ```{recipe-presets} kd
    ```

Both tables are made from the registered recipe when the site is built.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from typing import Any, ClassVar, get_args, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kdfast import recipes
from kdfast.text import markdown_table

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note|Warning):$")


def read_field_docs(settings: type) -> dict[str, str]:
    """The sentence below each field of a settings dataclass, by field name; a subclass's own sentence wins."""
    docs: dict[str, str] = {}
    for cls in reversed([c for c in settings.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, sentence in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(sentence, ast.Expr) and isinstance(sentence.value, ast.Constant):
                docs[field.target.id] = " ".join(str(sentence.value.value).split())
    return docs


def format_default(value: Any) -> str:
    """A default as the command line writes it."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tabulate_options(name: str) -> list[tuple[str, str, str]]:
    """(option, default, meaning) of each setting of a recipe."""
    settings = recipes.get(name).settings
    docs, hints = read_field_docs(settings), get_type_hints(settings)
    rows = []
    for field in dataclasses.fields(settings):
        choices = [f"`{c}`" for c in get_args(hints[field.name]) if isinstance(c, str)]
        meaning = docs[field.name] + (f" One of {', '.join(choices)}." if choices else "")
        rows.append((f"`--{field.name.replace('_', '-')}`", f"`{format_default(field.default)}`", meaning))
    return rows


def tabulate_presets(name: str) -> list[tuple[str, str]]:
    """(preset, what it reproduces) of a recipe."""
    return [(f"`{preset}`", entry.source) for preset, entry in recipes.get(name).presets.items()]


class RecipeTable(SphinxDirective):
    """A table of one recipe, whose name is the directive's argument."""

    required_arguments = 1
    header: ClassVar[tuple[str, ...]]

    def run(self) -> list[nodes.Node]:
        """Parses the table where the directive stands."""
        rows = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in self.tabulate(self.arguments[0])]
        parsed = self.parse_text_to_nodes(markdown_table(self.header, rows, left=range(len(self.header))))
        parsed[0]["classes"].append("names-first")  # kdfast.css keeps names in the first column whole
        return parsed


class RecipeOptions(RecipeTable):
    """Options of a recipe."""

    header = ("option", "default", "meaning")
    tabulate = staticmethod(tabulate_options)


class RecipePresets(RecipeTable):
    """Presets of a recipe."""

    header = ("preset", "what it is")
    tabulate = staticmethod(tabulate_presets)


def convert_docstring(lines: list[str]) -> list[str]:
    """Plain docstring lines as reStructuredText: indented blocks of text are literal, and * | _ mean themselves."""
    converted: list[str] = []
    in_text = True  # before the first section of Google's style
    literal = False
    section = ""
    for number, line in enumerate(lines):
        if SECTION.match(line):
            in_text, section = False, line
        if section == "Attributes:":
            line = re.sub(r"^    \w+(, \w+)+: ", lambda names: names[0].replace(", ", ","), line)  # Sphinx takes the first for a type
        indented = line.startswith("    ")
        if in_text and indented and not literal and not (number and lines[number - 1].strip()):
            converted += ["::", ""]
            literal = True
        elif in_text and line and not indented and literal:
            literal = False
        converted.append(line if literal else escape_markup(line, argument=not in_text))
        if in_text and not literal and number + 1 < len(lines) and line and lines[number + 1].startswith("    "):
            converted.append("")  # a block that follows its sentence without a blank line
    return converted


def escape_markup(line: str, *, argument: bool) -> str:
    """The line with reStructuredText's characters escaped, but for code in backquotes, doctest lines and an argument's name."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    name = re.match(r"\s*[*\w, ]+: ", line) if argument else None
    head, rest = (line[: name.end()], line[name.end() :]) if name else ("", line)
    parts = re.split(r"(`+[^`]*`+)", rest)
    return head + "".join(part if n % 2 else re.sub(r"([*|])|(?<=\w)_(?!\w)", r"\\\g<0>", part) for n, part in enumerate(parts))


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Converts a docstring in place, before napoleon reads it."""
    lines[:] = convert_docstring(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives and the docstring conversion."""
    app.add_directive("recipe-options", RecipeOptions)
    app.add_directive("recipe-presets", RecipePresets)
    app.connect("autodoc-process-docstring", process_docstring, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
