"""The exceptions that mean something to the user."""


class ConfigError(ValueError):
    """The command line, the configuration or the input is wrong; the message is one line and says how to mend it.

    It is raised before a process group, a model or a file exists, and ends the process with status 2.
    """


class ReplicaError(Exception):
    """Ranks that ought to hold the same do not: raised on every rank, with one line; ends the process with status 1."""


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line: some have no text, some a hundred lines."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
