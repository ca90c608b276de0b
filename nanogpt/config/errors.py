"""The exceptions that mean something to the user."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol, runtime_checkable


class ConfigError(ValueError):
    """The command line, the configuration or the input is wrong; the message is one line and says how to mend it.

    It is raised before a process group, a model or a file exists, and ends the process with status 2.
    """


class RunError(Exception):
    """A run cannot begin, go on or be finished, whatever its options; the message is one line and ends the process."""

    def __init__(self, message: str, *, status: int = 1, rank: int = 0, is_told: bool = False) -> None:
        """status: to leave with. rank: named with the line; 0: none. is_told: another process says the same."""
        super().__init__(message)
        self.status, self.rank, self.is_told = status, rank, is_told


class ReplicaError(RunError):
    """Ranks that ought to hold or compute the same do not: raised on every rank, with the same line."""


@runtime_checkable
class _ValidationError(Protocol):
    """Pydantic's, which the libraries that raise it bring along."""

    def errors(self) -> Sequence[Mapping[str, Any]]: ...


def one_line(error: BaseException, *, with_input: bool = False) -> str:
    """What an error of a library says, in one line: some have no text, some a hundred lines.

    with_input: of pydantic's also which field was wrong, and what it held, which may be a secret.
    """
    if type(error).__name__ == "ValidationError" and isinstance(error, _ValidationError):
        mistake = error.errors()[0]  # its text begins by saying only that there is one
        message = " ".join(str(mistake["msg"]).removeprefix("Value error, ").split())
        field = ".".join(map(str, mistake["loc"]))
        return f"{field}: {message} (found {mistake['input']!r})" if with_input else message
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    announced = list(takewhile(lambda line: line.endswith(":"), lines))  # torch.compile's says what in the next line
    return " ".join(lines[: len(announced) + 1]) or type(error).__name__
