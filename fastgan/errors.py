"""The one exception that stands for something a user typed or pointed at."""

from __future__ import annotations


class ArgumentError(ValueError):
    """An argument that cannot be used: one line naming it, what it was, and what it may be.

    Commands print the message and exit with code 2; library callers catch it as a `ValueError`.
    """

    def __init__(self, argument: str, was: object, may_be: str) -> None:
        super().__init__(f"{argument}: was {was!r}; {may_be}")
        self.argument, self.was, self.may_be = argument, was, may_be

    def renamed(self, argument: str) -> ArgumentError:
        """The same, for an argument that a caller knows by another name."""
        return ArgumentError(argument, self.was, self.may_be)

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, object, str]]:
        """As it comes from a worker process."""
        return ArgumentError, (self.argument, self.was, self.may_be)
