"""The one error that speaks to the user."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it, its value and the remedy.

    The command line prints it as `error: ...` and exits with status 2. Every other exception is a bug and keeps its
    traceback.
    """


class NotFiniteError(InputError):
    """A loss, a gradient or a weight is not finite; raised before the optimizer, or a checkpoint, takes it over.

    Args:
        what: the step, what is not finite, and its value.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is not finite: lower --model.learning_rate or look at the data; what was kept is finite, and "
            "where it leads here again, --ckpt_path best is from before"
        )


class NotWrittenError(InputError):
    """A file cannot be written; what stood there is untouched."""


def check(condition: bool, message: str) -> None:
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)
