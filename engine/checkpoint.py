"""Checkpoints that survive a crash at any moment.

A file appears under its name only when it is complete and on disk, and the name carries the checksum of the content, so
that data and checksum cannot part. Reading never unpickles code (``weights_only=True``).
"""

import hashlib
import logging
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from models.plain import PlainFileError, load_plain

FORMAT = 1
"""Version of the file's layout; raised whenever older code could not read newer files."""

_NAME = re.compile(r"checkpoint_(\d{8,})-([0-9a-f]{16})\.pt")
_TEMPORARY = ".tmp-"
_LEAVES = (int, float, bool, str, bytes, type(None), complex, torch.Size, torch.dtype, torch.device)

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message says why in one sentence."""


def atomic_write(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write a file so that readers see the old content or the new one, never a part of it, even after a crash.

    Args:
        path: the file; its folder is created when missing.
        content: the bytes, or a function that writes them to the binary file it is given.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, _ = _write_temporary(path.parent, content)
    _publish(temporary, path)
    return path


def save_checkpoint(directory: str | Path, state: dict[str, Any], step: int, keep: int = 2) -> Path:
    """Write ``state`` as ``checkpoint_<step>-<sha256[:16]>.pt`` and remove older ones once the new one is safe.

    Args:
        directory: the run's folder; created when missing.
        state: tensors, numbers, strings and None in dicts, lists and tuples, nothing else.
        step: optimizer steps done so far; also the order of the checkpoints. Files of a later step, which only a return
            to an earlier checkpoint can leave behind, are removed.
        keep: how many checkpoints stay, the new one included.

    Returns:
        The path of the new checkpoint.

    Raises:
        CheckpointError: ``state`` holds something that ``load_checkpoint`` would refuse, or the file cannot be written;
            the checkpoints before it are untouched then.
        ValueError: ``keep`` or ``step`` is out of range.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1: the checkpoint just written always stays")
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    _check_loadable(state, "state")
    directory = Path(directory)
    content = {"format": FORMAT, "state": state}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        temporary, digest = _write_temporary(directory, lambda file: torch.save(content, file))
        path = directory / f"checkpoint_{step:08d}-{digest[:16]}.pt"
        _publish(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {directory} ({error.strerror or error}): make room or "
            "give access; the last one is kept, and the same command goes on from it."
        ) from error

    others = [other for other in list_checkpoints(directory) if other != path]
    earlier = [other for other in others if _step(other) < step]
    for other in [other for other in others if other not in earlier] + earlier[keep - 1 :]:
        other.unlink(missing_ok=True)
    return path


def load_checkpoint(directory: str | Path, map_location: Any = "cpu") -> tuple[dict[str, Any], Path] | None:
    """Read the newest intact checkpoint of a folder.

    A damaged one is named in a warning and the one before it is used.

    Args:
        directory: the run's folder; it may be missing.
        map_location: where tensors go, as in ``torch.load``.

    Returns:
        The state and the file it came from, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: the file is intact but of an unknown format or holds what is not plain data, or every
            checkpoint there is has been damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    _remove_leftovers(directory)
    paths = list_checkpoints(directory)
    for path in paths:
        try:
            intact = _digest(path)[:16] == _checksum(path)
        except OSError as error:
            _log.warning("CHECKPOINT UNREADABLE: %s (%s); trying the one before it", path, error)
            continue
        if not intact:
            _log.warning("CHECKPOINT DAMAGED: %s has not the checksum in its name; trying the one before it", path)
            continue
        return _read(path, map_location), path
    if paths:
        raise CheckpointError(
            f"None of the {len(paths)} checkpoints in {directory} is intact: "
            "restore one, or remove them to start from the beginning."
        )
    return None


def list_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of a folder, the newest first, intact or not."""
    found = [path for path in Path(directory).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    try:
        content = load_plain(path, map_location)
    except PlainFileError as error:
        raise CheckpointError(f"{error}, so it is not loaded: restore the checkpoint or remove it.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found}, this version reads format {FORMAT}: use the version that wrote it."
        )
    state = content.get("state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no state of a run: restore the checkpoint or remove it.")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around loading a checkpoint's parts: what does not fit is the file's fault, told in one sentence.

    Raises:
        CheckpointError: something in it is missing, or of another kind or shape than this run's.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(
            f"{path} does not fit this run ({type(error).__name__}: {reason}): restore the checkpoint or remove it."
        ) from error


def load_parts(state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer, **parts: Any) -> None:
    """Load each part's entry of ``state`` into it, the model and the optimizer checked: names, shapes and dtypes.

    Raises:
        LookupError, ValueError, ...: an entry is missing or does not fit; see ``fitting``.
    """
    own = model.state_dict()
    if own.keys() != state["model"].keys():
        raise ValueError(f"the model has other weights: {min(own.keys() ^ state['model'].keys())}")
    for name, tensor in own.items():  # whose dtype would be converted in silence
        if (state["model"][name].shape, state["model"][name].dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"the model's {name} should be {tensor.dtype} of shape {tuple(tensor.shape)}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for parameter, values in optimizer.state.items():  # which torch would first look at in a step
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {name} has shape {tuple(value.shape)}")
    for name, part in parts.items():
        # older checkpoints have no counts of steps left out
        part.load_state_dict(state.get(name, {}) if name == "guard" else state[name])


def _check_loadable(value: Any, where: str) -> None:
    """Refuse at save time what would only be refused at the resume, when it is too late."""
    # Exact types: a NumPy scalar is a float to isinstance, but torch.load(weights_only=True) refuses it.
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_loadable(key, f"a key of {where}")
            _check_loadable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _check_loadable(item, f"{where}[{index}]")
    elif type(value) not in _LEAVES and not isinstance(value, torch.Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(
            f"{where} is a {kind}: a checkpoint holds tensors, numbers, strings and containers of them only."
        )


class _HashingWriter:
    """Passes what is written on to a file and keeps the SHA-256 of it, so that no second pass is needed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.error: OSError | None = None  # which torch.save reports as a RuntimeError of its own

    def write(self, data: Any) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_temporary(directory: Path, content: bytes | Callable[[BinaryIO], object]) -> tuple[Path, str]:
    """Write to a new hidden file of ``directory``, down to the disk; returns it with the hex SHA-256 of its content."""
    temporary = directory / f"{_TEMPORARY}{uuid.uuid4().hex}"
    writer = None
    try:
        with temporary.open("xb") as file:
            writer = _HashingWriter(file)
            if isinstance(content, bytes):
                writer.write(content)
            else:
                content(writer)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if writer is not None and writer.error is not None and error is not writer.error:
            raise writer.error from None
        raise
    return temporary, writer.hash.hexdigest()


def _publish(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    # Without this the new name may be lost with the power, although the data are on the disk.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(path: Path) -> int:
    return int(_match(path).group(1))


def _checksum(path: Path) -> str:
    return _match(path).group(2)


def _match(path: Path) -> re.Match[str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match
