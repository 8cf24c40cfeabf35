"""How a dataclass declares the keys of a command, how their values are typed and checked, and what the help says.

`commandline` reads a command line by these declarations. Nothing here imports torch or transformers.
"""

import math
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError, short

# Pixels, one side or [height, width]; typed as 224, 208 320, 208x320 or 208,320.
ImageSize = Annotated[int | list[int], "image size"]

# The words that transformers' HfArgumentParser takes.
BOOLEANS: dict[str, bool] = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}

PICTURE_FILES = (".png", ".webp", ".jpg", ".jpeg")
FINITE = sys.float_info.max
FLOAT32_MAX = 3.4028235e38

# type of a word -> how the help writes it, and what an error says it should be
KINDS: dict[Any, tuple[str, str]] = {
    int: ("N", "a whole number"),
    float: ("NUMBER", "a number"),
    bool: ("true|false", "true or false"),
    str: ("TEXT", "a single word"),
    ImageSize: ("SIZE", "an image size such as 224 or 208x320"),
}


def key(
    default: Any = MISSING,
    help_text: str = "",
    shown: Any = None,
    *,
    group: str = "",
    free: bool = False,
    place: bool = False,
    card: bool = True,
    positional: bool = False,
    metavar: str | None = None,
) -> Any:
    """A field of a dataclass that is a key of a command.

    Args:
        default: value if none is given; a key without a default is required.
        help_text: what the key does, in one line with its unit; the help adds choices and default.
        shown: what the help prints as the default where the field's is None, e.g. "found by type".
        group: heading under which the help lists it, see `GROUPS`.
        free: whether a resumed run may change it.
        place: whether a resumed run may change it as long as the data's fingerprint is the same.
        card: whether a model's card shows it; False for keys that say how a run was started, not what it computed.
        positional: whether words without a flag give it, in the order of the fields.
        metavar: placeholder for the value in the help, such as DIR; chosen by type when omitted.
    """
    marks = {"free": free, "place": place, "card": card, "positional": positional}
    return _field(default, {"help": help_text, "shown": shown, "group": group, "metavar": metavar, **marks})


# A key of one group of the help. The last four groups say how a run is computed, watched and kept, not what it
# computes: a resumed run may change their keys, except those with free=False.
data_key = partial(key, group="data")
model_key = partial(key, group="model")
masking_key = partial(key, group="masking")
optimization_key = partial(key, group="optimization")
output_key = partial(key, group="output")
evaluation_key = partial(key, group="evaluation", free=True)
checkpoint_key = partial(key, group="checkpoints", free=True)
log_key = partial(key, group="logging", free=True)
hardware_key = partial(key, group="hardware", free=True)
# A required key whose value is given without a flag, as the first words.
positional_key = partial(key, MISSING, positional=True)


def inherit(kind: Any, name: str, default: Any = MISSING, help_text: str | None = None, **changes: Any) -> Any:
    """Declare a key of another dataclass again, with another default, help text or other metadata of `key`."""
    changes |= {} if help_text is None else {"help": help_text}
    return _field(default, {**kind.__dataclass_fields__[name].metadata, **changes})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, kw_only=True, metadata=metadata)
    return field(default=default, kw_only=True, metadata=metadata)


class Recipe:
    """The base of every dataclass of keys. An object of it is checked when it is made, so no other code has to.

    Raises:
        UserError: for a value that can't be used.
    """

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise a UserError for a value that can't be used; needs neither torch nor the data."""

    @classmethod
    def adapt(cls, values: dict[str, Any], typed: Collection[str]) -> None:
        """Change values of a recipe file that don't suit other keys, but none of the keys `typed` by the user."""

    def check_least(self, **limits: float) -> None:
        """Raise a UserError for a key, or one number of its list, below its limit; None passes."""
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and not all(one >= least for one in _numbers(value)):
                raise UserError(f"{name} {short(value)} is too small; give {least} or more")

    def check_range(self, *names: str, low: float = 0, high: float = math.inf) -> None:
        """Raise a UserError for a key, or one number of its list, not finite or not in [low, high]; None passes."""
        limits = f"{low} or more" if high == math.inf else f"in [{low}, {high}]"
        for name in names:
            value = getattr(self, name)
            if value is not None and not all(low <= one <= min(high, FINITE) for one in _numbers(value)):
                raise UserError(f"{name} {short(value)} is out of range; give a number {limits}")

    def check_ending(self, name: str, *endings: str) -> None:
        """Raise a UserError for a file with another ending; None passes."""
        file = getattr(self, name)
        if file is not None and not file.lower().endswith(endings):
            allowed = " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))
            raise UserError(f"{name} {file} is not a {allowed} file; change its ending")

    def check_seed(self) -> None:
        """Raise a UserError for a seed that numpy doesn't take."""
        self.check_range("seed", high=2**32 - 1)

    def check_fraction(self, name: str, remedy: str) -> None:
        """Raise a UserError for a number outside (0, 1]; None passes."""
        if (value := getattr(self, name)) is not None and not 0 < value <= 1:
            raise UserError(f"{name} {value} lies outside (0, 1]; {remedy}")


class BadValue(Exception):
    """A value that its key can't have. Not a ValueError: argparse would replace our message with its own."""


@dataclass(frozen=True)
class Key:
    """A key as the parser needs it; `base` is the type of one word, `several` whether it takes more than one."""

    name: str
    base: Any
    several: bool
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flags(self) -> list[str]:
        return ["--recipe", "--config"] if self.name == "recipe" else [f"--{self.name}"]

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.base) if get_origin(self.base) is Literal else ()

    @property
    def none_is_typed(self) -> bool:
        return self.optional and self.base is not str and "none" not in self.choices

    @property
    def metavar(self) -> str:
        return self.metadata["metavar"] or ("WORD" if self.choices else KINDS[self.base][0])

    def bad_value(self, value: Any) -> BadValue:
        allowed = f"one of {', '.join(self.choices)}" if self.choices else KINDS[self.base][1]
        return BadValue(f"{self.name} {short(repr(value))} is not {allowed}{', or none' if self.none_is_typed else ''}")

    def read(self, word: Any) -> Any:
        """The value of a typed word. jsonargparse passes values here too, to check what it has read."""
        if not isinstance(word, str):
            return word
        word = word[1:] if word.startswith(" -") else word  # as `commandline` passes a negative number
        if self.none_is_typed and word.lower() == "none":
            return None
        try:
            if not word.strip():
                raise ValueError
            if self.choices:
                return self.choices[self.choices.index(word)]
            if self.base is bool:
                return BOOLEANS[word.lower()]
            return _sides(word) if self.base == ImageSize else self.base(word)
        except (ValueError, KeyError):
            raise self.bad_value(word) from None

    def join(self, value: Any) -> Any:
        """The value of the key from the values of its words."""
        if not self.several or value in (None, [None]):
            return None if value == [None] else value
        if None in value:
            raise self.bad_value(value)
        if self.base != ImageSize:
            return value
        sides = [side for part in value for side in part]
        if len(sides) > 2:
            raise self.bad_value(" ".join(map(str, sides)))
        return sides if len(sides) == 2 else sides[0]

    def to_words(self, value: Any) -> Any:
        """A recipe's value as it would be typed."""
        if isinstance(value, dict) and self.name.endswith("_schedule"):
            value = [f"{at}:{_typed(what).replace(' ', 'x')}" for at, what in value.items()]
        words = value if isinstance(value, list) else [value]
        if value is None and self.optional:
            return None
        if not all(isinstance(word, str) for word in words) or not (len(words) == 1 or (self.several and words)):
            raise self.bad_value(value)
        return words if self.several else words[0]

    def describe(self) -> str:
        """The line of the help, with choices and default."""
        default = self.metadata["shown"] if self.default is None else self.default
        notes = [", ".join(self.choices)] if self.choices else []
        if default is not None:
            notes.append("required" if default is MISSING else f"default: {_typed(default)}")
        text = self.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
        return text.replace("%", "%%")  # argparse would fill in %(default)s


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sides(word: str) -> list[int]:
    return [int(side) for side in re.split("[x,]", word)]


def read_size(word: str) -> int | list[int]:
    """An image size from one word, such as 224, 208x320 or 208,320; a ValueError for anything else."""
    sides = _sides(word)
    if len(sides) > 2:
        raise ValueError(f"{word} has more than a height and a width")
    return sides if len(sides) == 2 else sides[0]


def height_width(size: int | list[int]) -> tuple[int, int]:
    """Both sides of an image size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def names_where(kind: Any, **marks: bool) -> set[str]:
    """Names of the keys of a dataclass, or of an object of it, that have these marks of `key`, e.g. `free=True`."""
    return {one.name for one in fields(kind) if marks.items() <= one.metadata.items()}


def keys_of(kind: Any) -> dict[str, Key]:
    """The keys of a dataclass by name: its fields that have a help text."""
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: _key_of(one, hints[one.name]) for one in fields(kind) if "help" in one.metadata}


def _key_of(one: Any, hint: Any) -> Key:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    (base,) = [part for part in parts if part is not NoneType]
    is_list = get_origin(base) is list
    return Key(
        name=one.name,
        base=get_args(base)[0] if is_list else base,
        several=is_list or base == ImageSize,
        optional=NoneType in parts,
        default=one.default if one.default_factory is MISSING else one.default_factory(),
        metadata=one.metadata,
    )
