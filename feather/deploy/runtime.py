"""Compiled models from Python: numpy in, numpy out."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feather.deploy.emit import MARKER
from feather.deploy.errors import DeployError

_ALIGNMENT = 64


class Model:
    """A compiled network. Calling it runs it; one object may be used by one thread at a time.

    Attributes:
        info: name, title, target, batch, shapes and sizes, as the library states them.
    """

    def __init__(self, library: ctypes.CDLL, info: dict[str, Any]) -> None:
        self.info = info
        self.input_shape: tuple[int, ...] = tuple(info["input_shape"])
        self.output_shape: tuple[int, ...] = tuple(info["output_shape"])
        self.batch = int(info["batch"])
        self._run = getattr(library, f"{info['name']}_run")
        self._run.argtypes = [ctypes.c_void_p] * 3
        self._run.restype = None
        memory = np.empty(info["workspace_bytes"] + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self._workspace = memory[start : start + info["workspace_bytes"]]

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Run the network.

        Args:
            images: ``(count, *input_shape)``, any count, any real type; the last images of a count that the compiled
                batch does not divide are padded with zeros.

        Returns:
            float32 ``(count, *output_shape)``.

        Raises:
            DeployError: another shape.
        """
        images = np.asarray(images)
        if images.shape[1:] != self.input_shape or images.dtype.kind not in "fiub":
            raise DeployError(
                f"{self.info['name']} takes images of shape (count, {', '.join(map(str, self.input_shape))}); "
                f"got {images.dtype} {images.shape}"
            )
        images = np.ascontiguousarray(images, np.float32)
        results = np.empty((len(images), *self.output_shape), np.float32)
        whole = len(images) // self.batch * self.batch
        for i in range(0, whole, self.batch):
            self._run(images[i:].ctypes.data, results[i:].ctypes.data, self._workspace.ctypes.data)
        if whole < len(images):
            last = np.zeros((self.batch, *self.input_shape), np.float32)
            last[: len(images) - whole] = images[whole:]
            out = np.empty((self.batch, *self.output_shape), np.float32)
            self._run(last.ctypes.data, out.ctypes.data, self._workspace.ctypes.data)
            results[whole:] = out[: len(images) - whole]
        return results


def load(path: str | Path) -> Model:
    """Load a shared library that `compile_model` or ``feather compile`` built.

    Raises:
        DeployError: the file is missing, is no such library, or needs a processor other than this one.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeployError(
            f"{path} cannot be read ({error.strerror}): give a library built by feather compile"
        ) from None
    found = re.search(MARKER.encode() + rb"(\{[^\0]*\})\0", content)
    if found is None:
        raise DeployError(f"{path} is no library built by feather compile")
    info = json.loads(found[1])
    try:
        # From a copy of its own: the loader would give back an older library that it once loaded from this path.
        with tempfile.TemporaryDirectory() as directory:
            library = ctypes.CDLL(shutil.copy(path, directory))
    except OSError as error:
        raise DeployError(f"{path} (target {info['target']}) cannot be loaded on this machine: {error}") from None
    if not getattr(library, f"{info['name']}_supported")():
        raise DeployError(f"{path} is for target {info['target']}, which this processor lacks: compile it with another")
    return Model(library, info)
