"""One static page around a network compiled to WebAssembly: it classifies pictures and loads nothing."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feather.deploy.errors import DeployError

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(module: Path, info: dict[str, Any], labels: Sequence[str] = ()) -> Path:
    """Write ``NAME.html`` beside ``NAME.wasm``.

    Args:
        module: what `compile_model` built for the target wasm.
        info: what it said of itself.
        labels: names of the classes; without them the page shows their numbers.

    Raises:
        DeployError: the network is no classifier of single pictures.
    """
    shape, outputs = info["input_shape"], info["output_shape"]
    if len(shape) != 3 or shape[0] not in (1, 3) or len(outputs) != 1 or info["batch"] != 1:
        raise DeployError(
            f"{info['name']} maps {shape} to {outputs} in batches of {info['batch']}: a page needs one picture of 1 or "
            "3 channels and a score for each class"
        )
    network = {
        "mean": [0.0] * shape[0],
        "std": [1.0] * shape[0],
        **info,
        "labels": list(labels),
        "wasm": base64.b64encode(module.read_bytes()).decode(),
    }
    parts = {
        "TITLE": html.escape(str(info["title"])),
        "NETWORK": json.dumps(network).replace("<", "\\u003c"),  # nothing in it can end the script
    }
    page = module.with_suffix(".html")
    page.write_text(re.sub(r"/\*([A-Z]+)\*/", lambda found: parts[found[1]], TEMPLATE.read_text()))
    return page
