"""The exceptions that a user is meant to read; recipes print them without a traceback."""


class ConfigError(ValueError):
    """A mistake in what the user gave us. The message says what was got, what is allowed and what to do.

    Recipes exit with status 2.
    """


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""
