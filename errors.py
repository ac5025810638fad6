"""The two errors that a person is meant to read; everything else is a bug and keeps its traceback.

Every message says what is wrong, where, and what to do. The lowest module of the project: it imports nothing.
"""


class UserError(ValueError):
    """A mistake in what was asked for: a flag, a file, a mesh, a recipe. The command line exits with code 2."""


class RunError(RuntimeError):
    """The request was right and the world was not: a full disk, a corrupt file, a lost process. Exit code 1."""


def out_of_memory(error: BaseException) -> RunError | None:
    """What a person is told of XLA's error that a device's memory was not enough; None for every other error.

    XLA's own text is dozens of lines of buffers. Told by its name, for this module imports nothing.
    """
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return None
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
        return None
    said = " ".join(text.split())[:200]
    return RunError(
        f"memory: a device's was not enough ({said}). Keep less for the backward pass (--execution.remat full), cut "
        "the batch finer (--execution.microbatches), or spread the model over more devices (--mesh); `plan` says what "
        "fits. Nothing that was saved is lost"
    )
