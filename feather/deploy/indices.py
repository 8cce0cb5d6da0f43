"""Where the non-zeros are, in few bits: gaps between positions as Rice codes, or a bit for each position.

The bound to compare with is log2 C(size, count), the bits that any code needs if all choices of ``count`` positions out
of ``size`` are equally likely. Rice codes of the gaps stay within about 5 % of it at every sparsity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feather.deploy.errors import DeployError

Positions = NDArray[np.int64]
_LARGEST_SHIFT = 40


def bound_bits(size: int, count: int) -> float:
    """log2 C(size, count): the information in a choice of ``count`` positions out of ``size``."""
    ln = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return max(0.0, ln / math.log(2))


def encode(mask: NDArray[np.bool_]) -> tuple[dict[str, Any], bytes]:
    """Code a flat mask.

    Returns:
        What `decode` needs to know besides the size, and the bytes. Kinds: ``all``, ``none``, ``bitmask``, ``rice``
        (gaps between the set positions) and ``rice_unset`` (between the others, when those are fewer).
    """
    size, count = mask.size, int(np.count_nonzero(mask))
    if count in (0, size):
        return {"kind": "all" if count else "none"}, b""
    kind, positions = ("rice", np.flatnonzero(mask)) if 2 * count <= size else ("rice_unset", np.flatnonzero(~mask))
    gaps = np.diff(positions, prepend=-1) - 1
    shift = min(range(_LARGEST_SHIFT), key=lambda s: len(gaps) * (s + 1) + int((gaps >> s).sum()))
    ends = np.cumsum((gaps >> shift) + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    low = (gaps[:, None] >> np.arange(shift)[None, :]) & 1
    coded = np.packbits(unary).tobytes() + np.packbits(low.astype(np.uint8)).tobytes()
    if len(coded) >= -(-size // 8):
        return {"kind": "bitmask"}, np.packbits(mask).tobytes()
    return {"kind": kind, "count": len(gaps), "shift": shift, "unary": int(ends[-1])}, coded


def decode(code: dict[str, Any], content: bytes, size: int) -> NDArray[np.bool_]:
    """The mask that `encode` was given.

    Raises:
        DeployError: the bytes do not fit the description.
    """
    kind = code["kind"]
    if kind in ("all", "none"):
        return np.full(size, kind == "all")
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    if kind == "bitmask":
        if len(content) != -(-size // 8):
            raise DeployError("a bitmask is truncated")
        return bits[:size].astype(bool)
    count, shift, unary = int(code["count"]), int(code["shift"]), int(code["unary"])
    split = 8 * -(-unary // 8)
    ends = np.flatnonzero(bits[:unary])
    low_bits = bits[split : split + count * shift]
    if len(ends) != count or low_bits.size != count * shift:
        raise DeployError("a list of gaps is truncated")
    high = np.diff(ends, prepend=-1) - 1
    low = (low_bits.reshape(count, shift).astype(np.int64) << np.arange(shift)[None, :]).sum(1)
    positions = np.cumsum((high << shift) + low + 1) - 1
    if positions[-1] >= size:
        raise DeployError("a list of gaps points beyond its tensor")
    mask = np.zeros(size, bool)
    mask[positions] = True
    return mask if kind == "rice" else ~mask
