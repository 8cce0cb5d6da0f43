"""Constant tables of a C file: one array of bytes, written as a string."""

from __future__ import annotations

import numpy as np

_PLAIN = {code: chr(code) for code in range(32, 127) if chr(code) not in '"\\?'}
_ESCAPES = [_PLAIN.get(code, f"\\{code:03o}") for code in range(256)]


class Tables:
    """All constant tables in one array of bytes: compilers read a long string twelve times faster than numbers."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.known: dict[bytes, int] = {}

    def add(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], align: int = 4) -> int:
        """Position in bytes of the array's contents; equal contents are kept once."""
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        key = content + bytes([align])
        if key not in self.known:
            padding = -self.size % align
            self.parts += [bytes(padding), content]
            self.known[key] = self.size + padding
            self.size += padding + len(content)
        return self.known[key]

    def text(self) -> str:
        content = b"".join(self.parts) or b"\0"
        lines = [quote(content[start : start + 1024]) for start in range(0, len(content), 1024)]
        return "static const unsigned char data[] __attribute__((aligned(64), unused)) =\n" + "\n".join(lines) + ";\n"


def quote(content: bytes) -> str:
    """A C string of these bytes."""
    return '"' + "".join([_ESCAPES[byte] for byte in content]) + '"'
