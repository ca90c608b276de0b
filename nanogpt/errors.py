"""The one exception that means "the user can mend this"."""


class ConfigError(ValueError):
    """The command line, the configuration or the input is wrong; the message is one line and says how to mend it.

    It is raised before a process group, a model or a file exists, and ends the process with status 2.
    """
