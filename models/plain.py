"""Tensors from a file of unknown origin: looked through first, and refused before anything of it runs or is allocated.

A `.pt` file is a zip archive of a pickle and of one record per storage. `torch.load(weights_only=True)` runs no code
of the pickle's, but it inflates what is compressed and believes the sizes that it is told.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import torch


class PlainFileError(ValueError):
    """A file that is damaged, or holds more than plain data or other amounts than it claims; the message says which."""


def load_plain(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """`torch.load` for tensors, numbers, strings and containers of them.

    Raises:
        PlainFileError: the file is anything else; nothing of it has been executed.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path.stat().st_size)
        return torch.load(path, map_location=map_location, weights_only=True)
    except PlainFileError as error:
        raise PlainFileError(f"{path} {error}") from error
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes three parsers stumble over
        reason = " ".join(str(error).split())[:100]
        raise PlainFileError(f"{path} is no file of plain tensors ({type(error).__name__}: {reason})") from error


def _check(archive: zipfile.ZipFile, size: int) -> None:
    records: dict[str, int] = {}
    for info in archive.infolist():
        name = PurePosixPath(info.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in info.filename or info.filename in records:
            raise PlainFileError(f"names a record {info.filename!r}, which is no name in it")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise PlainFileError(f"has the compressed record {info.filename!r}, whose size nobody knows")
        records[info.filename] = info.file_size
    if sum(records.values()) > size:
        raise PlainFileError("claims to hold more than the whole file")
    (pickled,) = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
    prefix = pickled.removesuffix("data.pkl")
    with archive.open(pickled) as file:
        _Inspector(file, {name.removeprefix(prefix): n for name, n in records.items()}).load()


class _Storage:
    """Stands for a storage: how many values it has."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Inspector(pickle._Unpickler):  # type: ignore[name-defined,misc]  # the one in C believes sizes as well
    """Goes through a pickle without making anything but containers, numbers and strings."""

    def __init__(self, file: Any, records: dict[str, int]) -> None:
        super().__init__(file)
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _tensor if name == "_rebuild_tensor_v2" else lambda data, *_: data
        if module in ("torch", "torch.storage") and re.fullmatch(r"\w*Storage", name):
            return name
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        if (module, name) in (("torch", "Size"), ("torch", "device"), ("_codecs", "encode")):
            return lambda *values: values
        if name == "set" and module in ("builtins", "__builtin__"):
            return lambda *values: values
        raise PlainFileError(f"holds {module}.{name}, which is no plain data")

    def persistent_load(self, key: Any) -> _Storage:
        kind, name, record, _, numel = key
        dtype = {"UntypedStorage": torch.uint8, **_DTYPES}.get(name)
        there = self._records.get(f"data/{record}")
        if kind != "storage" or dtype is None or there is None or not isinstance(numel, int):
            raise PlainFileError(f"refers to {str(key)[:60]!r}, which it does not hold")
        if numel < 0 or numel * dtype.itemsize != there:
            raise PlainFileError(f"claims {numel} values of {dtype} where it holds {there} bytes")
        return _Storage(numel)


_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> None:
    """Refuse a view that reaches beyond its storage, or repeats it: copied, it would take any amount of memory."""
    values = [offset, *shape, *stride] if isinstance(shape, tuple) and isinstance(stride, tuple) else [None]
    if not isinstance(storage, _Storage) or not all(isinstance(v, int) and v >= 0 for v in values):
        raise PlainFileError("holds a tensor without a storage or a shape")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    if math.prod(shape) > storage.numel or (math.prod(shape) and last >= storage.numel):
        raise PlainFileError(f"holds a tensor of shape {shape} in {storage.numel} values")
