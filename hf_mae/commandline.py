"""Reads a command line into a dataclass of keys: its defaults, then a YAML recipe, then what the user typed.

`keys/__init__.py` says how a key is declared and how a value of each type is typed. jsonargparse merges the values and
prints the help. This file finds recipes and assigns words to keys. Every mistake becomes a one-line UserError.
"""

import re
import shutil
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from .errors import UserError, nearest, one_line, short
from .keys import BOOLEANS, BadValue, Key, Recipe, keys_of

T = TypeVar("T", bound=Recipe)

# The groups of keys, in the order of the help.
GROUPS = ["data", "model", "masking", "optimization", "evaluation", "output", "checkpoints", "logging", "hardware"]
HELP = ["--help", "-h"]
# Command with recipes -> what their names start with. All other recipes are for pretraining.
RECIPES = {"pretrain": "", "finetune": "finetune_", "evaluate linear-probe": "linear_probe_"}


def parse(
    kind: type[T],
    words: Sequence[str],
    prog: str,
    *,
    recipes: Mapping[str, Traversable] | None = None,
    description: str = "",
    examples: Sequence[str] = (),
) -> T:
    """Read a command line into a dataclass; `--help` prints the keys and exits with status 0.

    Args:
        kind: the dataclass. If it has a key `recipe`, that names the recipe to start from, as does `--config`.
        words: what was typed after the command, e.g. `["--recipe", "quickstart", "--seed", "1"]`. If a flag is
            given twice, the last one counts, so that words added to a script's command (`"$@"`) override it.
        prog: the command, e.g. "hf-mae pretrain".
        recipes: files of the recipes that can be given by name.
        description: what the command does, for the help.
        examples: whole command lines, for the help.

    Raises:
        UserError: for an unknown or missing key, one given with and without its flag, or a value that it can't have.
    """
    keys = keys_of(kind)
    parser = _build_parser(keys, prog, description, examples)
    flags = _name_positionals(keys, words, prog)
    typed = {word.partition("=")[0] for word in flags}
    try:
        given = parser.parse_args(flags)
        if (name := given.get("recipe")) is not None:
            given = parser.parse_args(flags, namespace=_parse_recipe(parser, keys, name, recipes or {}))
        values = {name: keys[name].join(value) for name, value in vars(given).items()}
    except BadValue as error:
        raise UserError(f"--{error}") from error
    for name, one in keys.items():
        if one.default is MISSING and name not in values:
            raise UserError(f"--{name} is missing: {one.metadata['help']}; see {prog} --help")
    if values.get("recipe"):
        kind.adapt(values, [one.name for one in keys.values() if typed.intersection(one.flags)])
    return kind(**values)


def shipped_recipes(command: str = "pretrain") -> dict[str, Traversable]:
    """The package's recipes of a command, by name; none for a command that isn't in `RECIPES`."""
    if command not in RECIPES:
        return {}
    prefix, prefixes = RECIPES[command], tuple(filter(None, RECIPES.values()))
    files = (resources.files("hf_mae") / "recipes").iterdir()
    names = {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
    return {name: names[name] for name in sorted(names) if name.startswith(prefix or prefixes) == bool(prefix)}


def read_recipe(name: str, recipes: Mapping[str, Traversable]) -> dict[str, Any]:
    """The keys of a recipe as they are written: words, lists or tables of words, or None.

    Args:
        name: one of `recipes` (files by name), or the path of a YAML file.

    Raises:
        UserError: if there is no such recipe (it names the nearest), or the file is not a table of keys.
    """
    file = recipes.get(name) or Path(name)
    try:
        if not (file.name.endswith((".yaml", ".yml")) and file.is_file()):
            if not recipes:
                raise UserError(f"unknown recipe '{short(name)}'; give a .yaml file that exists")
            known = f"(known: {', '.join(recipes)}; or give a .yaml file)"
            raise UserError(f"unknown recipe '{short(name)}'{nearest(name, recipes)} {known}")
        values = yaml.load(file.read_text(encoding="utf-8"), _Words)
    except OSError as error:
        raise UserError(f"recipe {name} can't be read: {error.strerror}; check its name and permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"recipe {name} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {name} is not a table of keys; write lines such as 'epochs: 800'")
    return values


class _Words(yaml.BaseLoader):
    """Keeps every scalar as it is written, so that `no` and `1e-6` mean the same as on the command line."""


_NULL = "tag:yaml.org,2002:null"
_Words.add_implicit_resolver(_NULL, re.compile("^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Words.add_constructor(_NULL, lambda loader, node: None)


class _Parser(ArgumentParser):
    """Raises one line where jsonargparse would print a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, ArgumentError):
            message = f"{ex.argument_name}: {ex.message}"
        raise UserError(f"{' '.join(message.split())}; see {self.prog} --help") from ex


class _HelpFormatter(RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **more: Any):
        width = min(100, max(60, shutil.get_terminal_size().columns))
        super().__init__(prog, **(more | {"width": width, "max_help_position": 36}))


def _build_parser(keys: dict[str, Key], prog: str, description: str, examples: Sequence[str]) -> ArgumentParser:
    first = [one.metavar + (" ..." if one.several else "") for one in keys.values() if one.metadata["positional"]]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *first, "[--key value ...]"]),
        description=description,
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    used = {one.metadata["group"] for one in keys.values()}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in used} | {"": parser}
    for one in keys.values():
        nargs: dict[str, Any] = (
            {"nargs": "?", "const": True} if one.base is bool else {"nargs": "+"} if one.several else {}
        )
        groups[one.metadata["group"]].add_argument(
            *one.flags, type=one.read, default=SUPPRESS, metavar=one.metavar, help=one.describe(), **nargs
        )
    return parser


def _parse_recipe(
    parser: ArgumentParser, keys: dict[str, Key], name: str, recipes: Mapping[str, Traversable]
) -> Namespace:
    values = read_recipe(name, recipes)
    for unknown in (one for one in values if one not in keys):
        raise UserError(f"unknown key '{short(unknown)}' in recipe {name}{nearest(str(unknown), keys)}")
    # The resolved recipe of a run has every key, and may name the recipe that it came from.
    if "recipe" in values and not {one for one in keys if keys[one].default is not None} <= values.keys():
        raise UserError(f"recipe {name} names another recipe, which isn't read; remove the key recipe from the file")
    try:
        given = parser.parse_object({one: keys[one].to_words(value) for one, value in values.items()})
        for one, value in vars(given).items():
            keys[one].join(value)
    except BadValue as error:
        raise UserError(f"recipe {name}: {error}") from error
    return given


def _name_positionals(keys: dict[str, Key], words: Sequence[str], prog: str) -> list[str]:
    """Add the flags of positional keys: `prepare SRC DST` becomes `prepare --dataset SRC --output_dir DST`."""
    first = [one for one in keys.values() if one.metadata["positional"]]
    flags, free = _part_words(keys, words, bool(first))
    for one in first:
        if not free:
            break
        taken = free if one.several else free[:1]
        free = free[len(taken) :]
        if any(word.partition("=")[0] in one.flags for word in flags):
            raise UserError(f"{one.name} is given twice, as '{taken[0]}' and as --{one.name}; leave one of them out")
        flags += [f"--{one.name}", *map(_as_value, taken)]
    if free:
        raise UserError(
            f"'{short(free[0])}' has no key; write --key {short(free[0])}, with one of the keys of {prog} --help"
        )
    return flags


def _as_value(word: str) -> str:
    """argparse takes -1e-5 for a flag, but never a word that starts with a space; `Key.read` removes it."""
    return f" {word}" if word.startswith("-") else word


def _part_words(keys: dict[str, Key], words: Sequence[str], first: bool) -> tuple[list[str], list[str]]:
    """Split words into flags with their values, and words for positional keys.

    A flag takes one word; the flag of a list takes all words up to the next flag. If the command has positional keys
    (`first`), a true-or-false flag takes a word only if that word is in `BOOLEANS` or is "none".
    """
    by_flag = {flag: one for one in keys.values() for flag in one.flags}
    flags, free, room = [], [], 0
    taking: Key | None = None
    for word in words:
        if word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha()):
            name, equals, _ = word.partition("=")
            taking = by_flag.get(name)
            if taking is None and name not in HELP:
                raise UserError(f"unknown argument '{short(word)}'{nearest(name, [*by_flag, *HELP])}")
            room = 0 if taking is None or equals else len(words) if taking.several else 1
            flags.append(word)
        elif room and not (first and taking and taking.base is bool and word.lower() not in (*BOOLEANS, "none")):
            flags.append(_as_value(word))
            room -= 1
        else:
            free.append(word)
    return flags, free
