"""The one exception for something that a user typed or pointed at."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 3, 8, 12, 12


def printable(text: str) -> str:
    """Return one line without control characters, which a terminal would obey; names of files may have any."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


class ArgumentError(ValueError):
    """An argument that cannot be used, described in one line.

    Commands print the line and exit with code 2; library callers catch it as a `ValueError`.

    Args:
        argument: as the user knows it: a flag, a key of a file, a parameter.
        got: its value; a long one is shortened in the message.
        problem: what the argument must be, as in "must be at least 1" or "must be cpu; torch sees no GPU here", or
            any other reason why the value cannot be used, as in "it already holds a run".
    """

    def __init__(self, argument: str, got: object, problem: str) -> None:
        shown = _SHORT.repr(got)
        if problem.startswith("must "):
            requirement, semicolon, why = problem.partition("; ")
            line = f"{argument} {requirement}, got {shown}{semicolon}{why}"
        else:
            line = f"{argument} {shown}: {problem}"
        super().__init__(printable(line))
        self.argument, self.got, self.problem = argument, got, problem

    def renamed(self, argument: str) -> ArgumentError:
        """The same, for an argument that a caller knows by another name."""
        return ArgumentError(argument, self.got, self.problem)

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, object, str]]:
        """As it comes from a worker process."""
        return ArgumentError, (self.argument, self.got, self.problem)
