"""How a program ends."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit with its status; quietly where the reader of its output, such as ``head``, has gone."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        # or the interpreter, flushing at its end, complains again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE  # as a shell tells it
    sys.exit(status)


def _reader_left() -> bool:
    """Whether it is this program's own output that broke, and no other pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
