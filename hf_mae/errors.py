"""What a user can mend, as opposed to a fault of the program."""


class UserError(ValueError):
    """What a user can mend: one line that says what happened, both values, and the remedy."""
