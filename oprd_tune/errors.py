"""The exceptions that a user is meant to read; recipes print them without a traceback."""


class ConfigError(ValueError):
    """A mistake in what the user gave us. The message says what was got, what is allowed and what to do.

    Recipes exit with status 2.
    """


class NothingLeftToDo(Exception):  # noqa: N818 - not an error
    """What the user asked for is done before training begins. Recipes print the message and exit with status 0."""


class RolloutError(RuntimeError):
    """Responses could not be had, or not proven to be the current student's. Raised before a step changes anything.

    Recipes save and exit with status 1.
    """


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""
