"""The errors that a user can cause and mend.

Everything that the command line turns into exit status 2 is a ``UserError``: it quotes the offending value and its
place, and says what would be right. Any other exception is a fault of ours and keeps its traceback.
"""


class UserError(Exception):
    """Bad input. ``str(error)`` is the whole message: the value, where it stands, and what would be right."""

    exit_status = 2


class RunFailedError(UserError):
    """A run or a check failed although its input was right; the message says why."""

    exit_status = 1


class ConfigError(UserError):
    """A key of a search space or of a run is unknown, of the wrong type or out of range."""

    def __init__(self, path: str, value: object, expected: str, source: str | None = None) -> None:
        self.path, self.value, self.expected, self.source = path, value, expected, source
        place = f"{source}: {path}" if source else path
        super().__init__(f"{place}: got {value!r}; expected {expected}")

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, object, str, str | None]]:
        return type(self), (self.path, self.value, self.expected, self.source)

    def at(self, source: str) -> "ConfigError":
        """The same error with the file it was read from."""
        return ConfigError(self.path, self.value, self.expected, source)


class UnsupportedGraphError(UserError):
    """A network uses an operator that the bounds do not understand; the message names it."""
