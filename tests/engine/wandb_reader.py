"""Reads an offline W&B run back. wandb itself ships no reader that Python code can call.

The file is a header of seven bytes and LevelDB's log format: blocks of 32 KiB, in them pieces with a header of seven
bytes (checksum, length, kind), a record being one piece or several.
"""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(folder: str | Path) -> list[Any]:
    """All records (wandb's protocol buffers) of a run's folder, or of the only offline run below a folder."""
    files = list(Path(folder).glob("*.wandb")) or list(Path(folder).glob("**/offline-run-*/*.wandb"))
    assert len(files) == 1, f"expected one offline run below {folder}, found {files}"
    deadline = time.monotonic() + 20
    while True:
        records = _parse(files[0].read_bytes())
        if any(record.HasField("exit") for record in records):
            break
        assert time.monotonic() < deadline, f"the run in {folder} never ended"
        time.sleep(0.02)  # W&B's own process writes the end a moment after finish() has returned
    return records


def _parse(data: bytes) -> list[Any]:
    records, position, partial = [], 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:
            position += left
            continue
        piece = data[position + 7 : position + 7 + length]
        position += 7 + length
        partial = piece if kind in (_FULL, _FIRST) else partial + piece
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            records.append(record)
    return records


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """What was logged, one dict per call of ``log``."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in read_records(folder)
        if record.HasField("history")
    ]


def read_step_metrics(folder: str | Path) -> dict[str, str]:
    """The x-axis of every defined metric."""
    found = {}
    for record in read_records(folder):
        if record.HasField("metric") and record.metric.step_metric:
            found[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return found


def read_summary(folder: str | Path) -> dict[str, Any]:
    """The values set by ``summary``."""
    found = {}
    for record in read_records(folder):
        if record.HasField("summary"):
            found.update(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
            )
    return found


def read_about(folder: str | Path) -> Any:
    """What the run is: ``run_id``, ``sweep_id``, ``project``, ``run_group``, ``job_type``, ``tags``, ..."""
    return next(record.run for record in read_records(folder) if record.HasField("run"))


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration that W&B shows, without its own notes."""
    items = read_about(folder).config.update
    return {item.key: json.loads(item.value_json) for item in items if item.key != "_wandb"}


def read_charts(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The definition of every custom chart that was logged, by its key."""
    found = {}
    for record in read_records(folder):
        for item in record.config.update if record.HasField("config") else ():
            if list(item.nested_key[:2]) == ["_wandb", "visualize"]:
                found[item.nested_key[2]] = json.loads(item.value_json)["panel_config"]
    return found


def read_tables(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of every table that was logged, by its key; one that was logged twice fails."""
    files, found = {}, {}
    for entry in read_history(folder):
        for key, value in entry.items():
            if key.endswith("/path") and str(value).endswith(".table.json"):
                assert key not in files, f"{key} was logged twice"
                files[key] = value
    for key, name in files.items():
        (path,) = Path(folder).glob(f"**/offline-run-*/files/{name}")
        content = json.loads(path.read_text())
        found[key.removesuffix("/path")] = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    return found
