"""The exceptions that a user is meant to read. Recipes print them without a traceback."""


class ConfigError(ValueError):
    """A mistake in the user's input. The message says what was given, what is allowed and what to do. Exit status 2."""


class DamagedCheckpoint(ConfigError):  # noqa: N818 - it says what is wrong
    """A checkpoint is not as it was written. The message names the file."""


class NothingLeftToDo(Exception):  # noqa: N818 - not an error
    """The user's request was finished before training began. Recipes print the message and exit with status 0."""


class RolloutError(RuntimeError):
    """The engine gave no responses, or nothing proves that the current student gave them.

    It is raised before a step changes anything. Recipes save and exit with status 1.
    """


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Recipes exit with status 1."""
