"""The one error that speaks to the user."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it, its value and the remedy.

    The command line prints it as `error: ...` and exits with status 2. Every other exception is a bug and keeps its
    traceback.
    """


def check(condition: bool, message: str) -> None:
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)
