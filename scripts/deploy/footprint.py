"""Peak memory and loading time of one runtime, in a process of its own.

    python scripts/deploy/footprint.py RUNTIME FILE SHAPE

Prints JSON: seconds to load the file (importing the runtime not counted), seconds of the first image, and the peak
resident set in bytes before and after.
"""

import importlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.deploy.contenders import contender  # noqa: E402

MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai_edge_litert.interpreter"}


def peak() -> int:
    """Largest resident set so far; ``ru_maxrss`` would begin with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def main() -> None:
    runtime, path, shape = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    bare = peak()
    base = runtime.removesuffix("_sparse")
    importlib.import_module(MODULES.get(base, "torch" if "torch" in base else "feather.deploy.runtime"))
    image = np.zeros((1, *shape), np.float32)
    imported = peak()
    start = time.perf_counter()
    run = contender(runtime, path)
    loaded = time.perf_counter()
    run(image)
    first = time.perf_counter()
    for _ in range(3):
        run(image)
    found = {"load_seconds": loaded - start, "first_seconds": first - loaded}
    print(json.dumps({**found, "python_bytes": bare, "imported_bytes": imported, "peak_bytes": peak()}))


if __name__ == "__main__":
    main()
