"""Every way to run a network that the benchmark compares, on one thread unless said otherwise.

``prepare`` writes what each runtime loads; ``contender`` loads it and gives a function that runs one image. The module
imports a runtime only when it is asked for, so that a child process that measures memory holds that one alone.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
TFLITE_PYTHON = "TFLITE_PYTHON"
DENSE = ("torch", "torch_compiled", "onnxruntime", "openvino", "litert")


def prepare(model: Any, shape: tuple[int, ...], directory: Path, *, runtimes: bool) -> dict[str, Path]:
    """Files of one network by runtime: the C library always, with ``runtimes`` what the others load too."""
    import torch

    from feather.deploy import compile_model, onnx_file, save_weights
    from feather.deploy.capture import capture
    from feather.deploy.fuse import fuse
    from scripts.deploy.tflite import dump

    directory.mkdir(parents=True, exist_ok=True)
    library = compile_model(model, shape, directory, name="net").library
    assert library is not None
    files = {"feather": library, "bitmask": directory / "net.feather"}
    save_weights(model, files["bitmask"])
    if not runtimes:
        return files
    graph = fuse(capture(model, shape))
    files["onnxruntime"] = files["openvino"] = directory / "net.onnx"
    onnx_file.save(graph, files["onnxruntime"])
    files["torch"] = files["torch_compiled"] = directory / "net.pt2"
    torch.export.save(torch.export.export(model, (torch.zeros(1, *shape),)), files["torch"])
    python = os.environ.get(TFLITE_PYTHON)
    if python:
        dump(graph, directory / "net.npz")
        script = Path(__file__).with_name("tflite.py")
        for name, options in (("litert", []), ("litert_sparse", ["--sparse"])):
            files[name] = directory / f"{name}.tflite"
            command = [python, str(script), str(directory / "net.npz"), str(files[name]), *options]
            subprocess.run(command, check=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    return files


def contender(runtime: str, path: Path, threads: int = 1) -> Run:
    """Load a file; the result maps images ``(count, ...)`` to their scores.

    Raises:
        ImportError: the runtime is not installed.
    """
    load: Callable[..., Run] = globals()[f"_{runtime.removesuffix('_sparse')}"]
    return load(path) if threads == 1 else load(path, threads)


def version(runtime: str) -> str:
    """Of the package behind a runtime."""
    package = {"torch_compiled": "torch", "litert": "ai-edge-litert"}.get(runtime, runtime)
    from importlib.metadata import version as installed

    return installed(package)


def _feather(path: Path) -> Run:
    from feather.deploy import load

    return load(path)


def _torch(path: Path) -> Run:
    import torch

    torch.set_num_threads(1)
    module = torch.export.load(path).module()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            result: NDArray[np.float32] = module(torch.from_numpy(image)).numpy()
        return result

    return run


def _torch_compiled(path: Path) -> Run:
    import torch

    torch.set_num_threads(1)
    module = torch.compile(torch.export.load(path).module(), options={"freezing": True, "max_autotune": False})

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            result: NDArray[np.float32] = module(torch.from_numpy(image)).numpy()
        return result

    return run


def _onnxruntime(path: Path, threads: int = 1) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"input": image})[0]


def _openvino(path: Path) -> Run:
    runtime = importlib.import_module("openvino")
    core = runtime.Core()
    model = core.read_model(path)
    model.reshape([1, *[int(size.get_length()) for size in list(model.inputs[0].partial_shape)[1:]]])
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda image: request.infer([image], share_inputs=True, share_outputs=True)[0]


def _litert(path: Path) -> Run:
    runtime = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = runtime.Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    place, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        interpreter.set_tensor(place, image)
        interpreter.invoke()
        scores: NDArray[np.float32] = interpreter.get_tensor(result)
        return scores

    return run
