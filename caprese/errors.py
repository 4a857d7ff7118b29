"""The one exception users meet: a line that names the cause and the remedy."""


class CapreseError(Exception):
    """Bad input or environment. The message is one line: what is wrong, and what to do about it."""
