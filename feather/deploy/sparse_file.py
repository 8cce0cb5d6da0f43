"""A compressed file for sparse weights: where the non-zeros are, what they are, and nothing for the zeros.

Layout, little-endian: the 8 bytes ``FEATHER\\x01``; the SHA-256 of all that follows; 8 bytes with the compression's
name; a uint32 length and as many bytes of compressed JSON, which lists the tensors; the indices; the streams. A weight
(two dimensions or more, float32) has an index (`indices`) and, in a stream shared by all weights, the values of its
non-zeros: float32, float16, or int8 with one float32 scale for each output channel. Every other tensor goes as it is
into the stream of its type. Streams are compressed byte plane by byte plane: exponents repeat, mantissas do not.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feather.deploy import indices
from feather.deploy.errors import DeployError

MAGIC = b"FEATHER\x01"
VALUES = ("fp32", "fp16", "int8")
_HEAD = len(MAGIC) + 32
_STORED: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "scale": np.float32}
_UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model in several forms.

    Attributes:
        dense: every tensor as plain float32 (or its own type).
        dense_compressed: the same, compressed as a whole.
        file: what was written.
        index: the part of it that says where the non-zeros are.
        index_bound: log2 C(size, non-zeros) over all weights, in bytes: no code does better on average.
        weights, nonzeros: entries of the tensors with an index.
        codec: of the compression, ``zstd`` or ``zlib``.
    """

    dense: int
    dense_compressed: int
    file: int
    index: int
    index_bound: float
    weights: int
    nonzeros: int
    codec: str

    def __str__(self) -> str:
        over = (
            f"{self.index / self.index_bound:.3f} x its bound of {self.index_bound:,.0f}" if self.index_bound else "-"
        )
        return "\n".join(
            [
                f"non-zeros        {self.nonzeros:>12,} of {self.weights:,} weights",
                f"dense            {self.dense:>12,} bytes",
                f"dense, {self.codec}      {self.dense_compressed:>12,} bytes",
                f"file             {self.file:>12,} bytes ({self.dense / self.file:.1f} times smaller)",
                f"index within it  {self.index:>12,} bytes: {over}",
            ]
        )


def _codec(name: str | None) -> tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    """Name, compression and decompression; None takes zstd if it is installed, else zlib."""
    if name in (None, "zstd"):
        try:
            zstandard: Any = importlib.import_module("zstandard")
        except ImportError:
            if name == "zstd":
                raise DeployError("This file is compressed with zstd: install the package zstandard") from None
        else:
            pack, unpack = zstandard.ZstdCompressor(level=12), zstandard.ZstdDecompressor()
            return "zstd", pack.compress, unpack.decompress
    if name not in (None, "zlib"):
        raise DeployError(f"Unknown compression {name!r}: use zstd or zlib")
    return "zlib", lambda data: zlib.compress(data, 9), zlib.decompress


class _Streams:
    """Arrays of one type go one after another into one stream, which compresses better than each alone."""

    def __init__(self) -> None:
        self.parts: dict[str, list[NDArray[Any]]] = {}

    def add(self, name: str, values: NDArray[Any]) -> None:
        self.parts.setdefault(name, []).append(values.reshape(-1))

    def pack(self, compress: Callable[[bytes], bytes]) -> tuple[dict[str, list[int]], bytes]:
        """[compressed length, values] of each stream in order, and their bytes."""
        table, content = {}, b""
        for name, parts in self.parts.items():
            values = np.concatenate(parts)
            packed = compress(_planes(values))
            table[name] = [len(packed), len(values)]
            content += packed
        return table, content


def _planes(values: NDArray[Any]) -> bytes:
    """All first bytes, then all second bytes, and so on."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _from_planes(content: bytes, dtype: Any, count: int) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize
    if len(content) != size * count:
        raise DeployError("a section is truncated")
    return np.ascontiguousarray(np.frombuffer(content, np.uint8).reshape(size, count).T).reshape(-1).view(dtype)


def save(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, *, values: str = "fp32", codec: str | None = None
) -> Sizes:
    """Write a model's tensors.

    Args:
        model: a module or its state dict.
        values: of the non-zeros: ``fp32`` (loads back bit for bit), ``fp16``, or ``int8`` with a scale for each output
            channel.
        codec: ``zstd``, ``zlib``, or None: zstd where the package zstandard is installed.

    Raises:
        DeployError: an unknown argument; a weight too large for fp16, or one that is not finite with int8.
    """
    if values not in VALUES:
        raise DeployError(f"Unknown kind of values {values!r}: use {', '.join(VALUES)}")
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    name, compress, _ = _codec(codec)
    streams = _Streams()
    entries: list[list[Any]] = []
    index = b""
    weights = nonzeros = 0
    bound = 0.0
    raw = []
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        raw.append(content.tobytes())
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype == torch.float32 and tensor.dim() >= 2:
            weight = tensor.reshape(-1).numpy()
            mask = weight.view(np.uint32) != 0  # a negative zero is a value: it must come back
            code, coded = indices.encode(mask)
            index += coded
            stored, scale = _quantize(key, weight, mask, tensor.shape[0], values)
            streams.add(values, stored)
            if scale is not None:
                streams.add("scale", scale)
            entries.append([key, dtype, list(tensor.shape), code, len(coded)])
            count = int(np.count_nonzero(mask))
            weights, nonzeros = weights + mask.size, nonzeros + count
            bound += indices.bound_bits(mask.size, count) / 8
        else:
            streams.add(dtype, content.view(_UNSIGNED[tensor.element_size()]))
            entries.append([key, dtype, list(tensor.shape)])
    table, packed = streams.pack(compress)
    description = {"tensors": entries, "values": values, "index": len(index), "streams": table}
    header = compress(json.dumps(description, separators=(",", ":")).encode())
    body = name.encode().ljust(8, b"\0") + struct.pack("<I", len(header)) + header + index + packed
    Path(path).write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
    dense = b"".join(raw)
    return Sizes(len(dense), len(compress(dense)), _HEAD + len(body), len(index), bound, weights, nonzeros, name)


def _quantize(
    key: str, weight: NDArray[np.float32], mask: NDArray[np.bool_], channels: int, values: str
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    kept = weight[mask]
    if values == "fp32":
        return kept, None
    if not np.isfinite(kept).all():
        raise DeployError(f"{key} holds a weight that is not finite: {values} cannot hold it, use fp32")
    if values == "fp16":
        if np.abs(kept).max(initial=0) > np.finfo(np.float16).max:
            raise DeployError(f"{key} holds a weight beyond the range of fp16: use fp32 or int8")
        return kept.astype(np.float16), None
    largest = np.abs(weight.reshape(channels, -1 if weight.size else 0)).max(1, initial=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    row = np.flatnonzero(mask) // max(1, weight.size // max(1, channels))
    return np.clip(np.rint(kept / scale[row]), -127, 127).astype(np.int8), scale


def load(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors back, dense, ready for ``load_state_dict``.

    Raises:
        DeployError: the file is missing, of another kind, damaged, or needs a package that is not installed.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeployError(f"{path} cannot be read ({error.strerror})") from None
    if not content.startswith(MAGIC):
        raise DeployError(f"{path} is no compressed file of feather export")
    body = content[_HEAD:]
    if hashlib.sha256(body).digest() != content[len(MAGIC) : _HEAD]:
        raise DeployError(f"{path} is damaged or truncated: its checksum does not match, copy or export it again")
    _, _, decompress = _codec(body[:8].rstrip(b"\0").decode())
    (length,) = struct.unpack("<I", body[8:12])
    description = json.loads(decompress(body[12 : 12 + length]))
    reader = _Reader(description, body[12 + length :], decompress)
    return {entry[0]: reader.tensor(entry) for entry in description["tensors"]}


class _Reader:
    """Takes tensors from the streams in the order in which they were written."""

    def __init__(self, description: dict[str, Any], data: bytes, decompress: Callable[[bytes], bytes]) -> None:
        self.index = data[: description["index"]]
        self.kind: str = description["values"]
        self.streams: dict[str, NDArray[Any]] = {}
        at = len(self.index)
        for name, (size, count) in description["streams"].items():
            stored = _STORED.get(name) or _UNSIGNED[getattr(torch, name).itemsize]
            self.streams[name] = _from_planes(decompress(data[at : at + size]), stored, count)
            at += size

    def take(self, name: str, count: int) -> NDArray[Any]:
        values = self.streams[name]
        self.streams[name] = values[count:]
        return values[:count]

    def tensor(self, entry: list[Any]) -> Tensor:
        _, dtype, shape, *code = entry
        size = int(np.prod(shape, dtype=np.int64))
        if not code:
            content = torch.from_numpy(self.take(dtype, size).copy().view(np.uint8))
            return content.view(getattr(torch, dtype)).reshape(shape)
        coded, self.index = self.index[: code[1]], self.index[code[1] :]
        mask = indices.decode(code[0], coded, size)
        values = self.take(self.kind, int(np.count_nonzero(mask))).astype(np.float32)
        if self.kind == "int8":
            scale = self.take("scale", shape[0])
            values = values * scale[np.flatnonzero(mask) // max(1, size // max(1, shape[0]))]
        weight = np.zeros(size, np.float32)
        weight[mask] = values
        return torch.from_numpy(weight).reshape(shape)
