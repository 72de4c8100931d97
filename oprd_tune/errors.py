"""The one exception a user is meant to read."""


class ConfigError(ValueError):
    """A mistake in what the user gave us. The message says what was got, what is allowed and what to do.

    Recipes print it without a traceback and exit with status 2.
    """
