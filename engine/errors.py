"""Mistakes of the user end with one sentence; mistakes of the program keep their traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.checkpoint import CheckpointError
from engine.config import ConfigError
from engine.data import DataError


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that describe themselves in a sentence into ``ConfigError``, which Hydra prints without a traceback.

    By default those of setting a run up: ValueError, OSError, damaged data and checkpoints. HYDRA_FULL_ERROR=1 shows
    the traceback all the same.
    """
    try:
        yield
    except BrokenPipeError:  # of standard output: who reads it has left
        raise
    except kinds or (ValueError, OSError, DataError, CheckpointError) as error:  # noqa: B030
        raise ConfigError(f"{_sentence(error).rstrip('.')}.") from error


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return (
            f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}; the same command goes on once it can"
        )
    return " ".join(str(error).split())
