"""A download that is cut, stalls or brings something else: resumed or redone, and checked."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import io
import pickle
import random
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data import DataError, create_data, download
from engine.data.download import fetch, one_at_a_time

CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """``cuts``: after how many bytes each of the first answers breaks off; ``ranges``: whether it can resume."""

    daemon_threads = True

    def __init__(self, content: bytes, cuts: list[int], ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.cuts, self.ranges = content, list(cuts), ranges
        self.asked: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start and start >= len(self.server.content):
            self.send_error(416)
            return
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_transfer_goes_on_where_it_stopped(ranges: bool, tmp_path: Path) -> None:
    server = Server(CONTENT, [100_000, 50_000], ranges)
    path = fetch(server.url, tmp_path / "new" / "file", MD5)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert server.asked == [None, "bytes=100000-", "bytes=150000-" if ranges else "bytes=50000-"]


def test_what_an_earlier_process_left_is_used(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:200_000])
    server = Server(CONTENT, [])
    assert fetch(server.url, tmp_path / "file", MD5).read_bytes() == CONTENT
    assert server.asked == ["bytes=200000-"]


@pytest.mark.parametrize("left", [b"x" * 200_000, b"x" * 400_000, CONTENT])
def test_what_is_wrong_is_fetched_anew(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(left)
    assert fetch(Server(CONTENT, []).url, tmp_path / "file", MD5).read_bytes() == CONTENT


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"has not the checksum {MD5}"):
        fetch(Server(b"another file", []).url, tmp_path / "file", MD5)
    assert not list(tmp_path.iterdir())


def test_a_server_that_always_cuts_is_named_and_what_came_is_kept(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be fetched: the transfer ended after"):
        fetch(Server(CONTENT, [10] * 9).url, tmp_path / "file", MD5)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:50]


def cifar_archive() -> tuple[bytes, dict[str, str]]:
    """An archive in CIFAR-100's layout, of 200 training and 100 test images, and its files' checksums."""
    files = {
        name: pickle.dumps({"data": np.zeros((count, 3072), "uint8"), "fine_labels": [i % 100 for i in range(count)]})
        for name, count in (("train", 200), ("test", 100))
    } | {"meta": pickle.dumps({"fine_label_names": [str(i) for i in range(100)]})}  # fmt: skip
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue(), {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


def serve_cifar(monkeypatch: pytest.MonkeyPatch, cut: bool = False) -> Server:
    from torchvision.datasets import CIFAR100

    archive, sums = cifar_archive()
    server = Server(archive, [len(archive) // 3, 10] if cut else [])
    for name, value in {
        "url": server.url,
        "tgz_md5": hashlib.md5(archive).hexdigest(),
        "train_list": [["train", sums["train"]]],
        "test_list": [["test", sums["test"]]],
        "meta": {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]},
    }.items():
        monkeypatch.setattr(CIFAR100, name, value)
    return server


def test_of_two_processes_one_fetches_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, meeting = serve_cifar(monkeypatch), threading.Barrier(2)
    transfer = download._transfer

    def slowly(url: str, part: Path) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(1.0)  # here the two would meet
        transfer(url, part)

    monkeypatch.setattr(download, "_transfer", slowly)
    options: dict[str, Any] = {"root": tmp_path / "data", "batch_size": 50, "seed": 0, "device": "cpu"}
    with ThreadPoolExecutor(2) as pool:  # the lock belongs to an open folder: two threads are as two processes
        opened = [pool.submit(create_data, "cifar100", download=True, **options) for _ in range(2)]
    assert [future.result().train.num_samples for future in opened] == [200, 200]
    assert server.asked == [None]
    assert not list((tmp_path / "data").glob("*.part"))


def test_a_folder_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    with one_at_a_time(tmp_path):
        assert "cannot be locked (Bad file descriptor)" in caplog.text


def test_cifar_arrives_over_a_line_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    server = serve_cifar(monkeypatch, cut=True)
    options: dict[str, Any] = {"root": tmp_path / "data", "batch_size": 50, "seed": 0, "device": "cpu"}
    options["download"] = True
    assert create_data("cifar100", **options).train.num_samples == 200
    assert len(server.asked) == 3
    server.shutdown()

    (tmp_path / "data" / "cifar-100-python" / "train").write_bytes(b"cut while it was unpacked")
    assert create_data("cifar100", **options).train.num_samples == 200  # unpacked anew from the archive
    (tmp_path / "data" / "cifar-100-python" / "train").unlink()
    archive_file = tmp_path / "data" / CIFAR100.filename
    archive_file.unlink()
    server.server_close()
    with pytest.raises(DataError, match="lacks train, and the download failed"):
        create_data("cifar100", **options)
