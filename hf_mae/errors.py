"""Errors that a user can fix, and the few kinds that callers handle differently."""

import difflib
import logging
import re
from collections.abc import Iterable
from typing import Any

# A scheme, then a user and password, then host and path, then a query, up to a space or quotation mark.
_URL = re.compile(r"""(\w://)(?:[^\s/?#'"]*@)?([^\s?'"]*)(?:\?[^\s'"]*)?""")


def without_secrets(value: Any) -> Any:
    """Cut user info and query out of the URLs in a text, or in the values of a list or table; others pass unchanged.

    Both may hold a password, token or signature. Names are stored and shown without them.
    """
    if isinstance(value, str):
        return _URL.sub(r"\1\2", value)
    if isinstance(value, dict):
        return {key: without_secrets(one) for key, one in value.items()}
    return [without_secrets(one) for one in value] if isinstance(value, list) else value


class _WithoutSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True


def public_logger(name: str) -> logging.Logger:
    """The logger of a module that knows URLs; none of its messages has `without_secrets`' secrets."""
    logger = logging.getLogger(name)
    if not logger.filters:
        logger.addFilter(_WithoutSecrets())
    return logger


def one_line(error: BaseException) -> str:
    """The message of an error on one line of at most 300 characters, without secrets."""
    text = " ".join(without_secrets(str(error)).split()).rstrip(".") or type(error).__name__
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
    """An error that a user can fix: one line that says what happened, both values, and the remedy; without secrets."""

    def __init__(self, *args: Any):
        super().__init__(*without_secrets(list(args)))


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
