"""The one error type that a user's input can cause."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: what was wrong, the value seen, and the fix. The command line prints it and
    exits with code 2; in Python it is a plain ``ValueError``.
    """
