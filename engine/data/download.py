"""Files from the network: a transfer that is cut is resumed, and nothing counts as there before its checksum fits."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

_ATTEMPTS = 5
_PAUSE_SECONDS = 2.0  # before the second attempt; doubled with every further one
_TIMEOUT_SECONDS = 30.0  # without a byte
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Around fetching and unpacking into ``folder``, which exists: other processes wait, and then find it done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # such as a network file system without locks
            _log.warning("%s cannot be locked (%s): let no two processes download into it", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def fetch(url: str, path: Path, md5: str) -> Path:
    """Download ``url`` to ``path``, which appears only when it is complete and has the checksum ``md5``.

    What has arrived is kept in ``<path>.part``; the next attempt, or the next call, goes on from there. Several
    processes need ``one_at_a_time``.

    Raises:
        OSError: it could not be fetched, or what came has another checksum every time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, problem = path.with_name(f"{path.name}.part"), ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            _transfer(url, part)
        except (OSError, HTTPException) as error:  # urllib's errors among them
            problem = str(error) or type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:  # nothing follows: wrong, or complete
                problem = "the server has less than what is here"
            elif isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500:
                break
            else:
                continue
        if _md5(part) == md5:
            part.replace(path)
            return path
        part.unlink(missing_ok=True)  # not what it should be: from the beginning
        problem = problem or f"what came has not the checksum {md5}"
    raise OSError(f"{url} could not be fetched: {problem}")


def _transfer(url: str, part: Path) -> None:
    there = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
        resumed = answer.status == 206
        expected = answer.headers.get("Content-Length")
        received = 0
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
    if expected is not None and received < int(expected):
        raise ConnectionError(f"the transfer ended after {received} of {expected} bytes")


def _md5(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
