"""Errors that a user can mend, and the few kinds of them that callers tell apart."""


class UserError(ValueError):
    """What a user can mend: one line that says what happened, both values, and the remedy."""


class DataError(UserError):
    """Something is wrong with the data, or with what was asked of it."""


class SourceUnavailable(DataError):
    """The network failed at every try."""


class MissingPackage(UserError, ImportError):
    """A package of an extra is not installed: the user's to mend, so not a fault of an image."""


class CheckpointError(UserError):
    """A checkpoint is missing, broken, or belongs to another run."""


class DiskFullError(CheckpointError):
    """There was no room for a checkpoint; existing ones stay intact."""
