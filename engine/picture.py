"""Picture files that carry the hash of their data, so that a stale one is found without comparing pixels."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = dict[str, Any]

FORMATS = (".png", ".svg")
HASH_KEY = "feather-data-sha256"


def data_hash(data: Data) -> str:
    """SHA-256 of the plotted numbers and names."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def stored_hash(path: Path) -> str | None:
    """The hash that a PNG or SVG carries; None where there is none, or no such picture."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if path.suffix == ".svg":
        found = re.search(rb"%b:([0-9a-f]{64})" % HASH_KEY.encode(), content)
        return found[1].decode() if found else None
    position = 8
    while position + 8 <= len(content):
        (length,), kind = struct.unpack(">I", content[position : position + 4]), content[position + 4 : position + 8]
        if kind == b"tEXt":
            key, _, value = content[position + 8 : position + 8 + length].partition(b"\0")
            if key.decode("latin-1") == HASH_KEY:
                return value.decode("latin-1")
        position += length + 12
    return None


def save(figure: Figure, path: Path, data: Data) -> None:
    """Write ``figure`` as PNG or SVG, by the suffix, with its data's hash and without date or version."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    digest = data_hash(data)
    metadata: Any = {"Software": None, HASH_KEY: digest}
    if path.suffix == ".svg":
        metadata = {"Date": None, "Creator": None, "Description": f"{HASH_KEY}:{digest}"}
    artists = [*figure.get_children(), *figure.legends]
    with matplotlib.rc_context({"svg.hashsalt": digest, "svg.fonttype": "path"}):
        figure.savefig(path, metadata=metadata, bbox_inches="tight", bbox_extra_artists=artists, facecolor="white")
