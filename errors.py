"""The two errors that a person is meant to read; everything else is a bug and keeps its traceback.

Every message says what is wrong, where, and what to do. The lowest module of the project: it imports nothing.
"""


class UserError(ValueError):
    """A mistake in what was asked for: a flag, a file, a mesh, a recipe. The command line exits with code 2."""


class RunError(RuntimeError):
    """The request was right and the world was not: a full disk, a corrupt file, a lost process. Exit code 1."""
