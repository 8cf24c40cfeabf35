"""Errors that a user can fix, and the few kinds that callers handle differently."""

import difflib
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """The message of an error on one line of at most 300 characters."""
    # Signed URLs carry their credentials behind the question mark.
    words = [word.split("?", 1)[0] + "?[...]" if "://" in word and "?" in word else word for word in str(error).split()]
    text = " ".join(words).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def short(value: object) -> str:
    """A value as a message shows it: its first 100 characters."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint for the message about an unknown word: the known word most like it. Empty if none is similar."""
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


class UserError(ValueError):
    """An error that a user can fix: one line that says what happened, both values, and the remedy."""


class DataError(UserError):
    """The data is broken, missing, or can't be used as requested."""


class SourceUnavailable(DataError):
    """The network failed on every try."""


class MissingPackage(UserError, ImportError):
    """A package of an extra is not installed. It must not count as a broken image."""


class CheckpointError(UserError):
    """A checkpoint is missing, broken, or belongs to another run."""


class DiskFullError(CheckpointError):
    """The disk has no room for a checkpoint; existing checkpoints stay intact."""
