"""The tables and the picture of deployment, from evidence as scripts/bench_deploy.py writes it."""

from __future__ import annotations

from typing import Any

from engine import deployment, drawing

SURROUNDINGS = {"hardware": {"cpu": "CPU"}, "runtimes": {"onnxruntime": "1.0"}, "git_commit": "0123456789abcdef"}


def row(runtime: str, sparsity: float, microseconds: float) -> dict[str, Any]:
    own = {"target": "avx2"} if runtime == "feather" else {}
    return {
        "runtime": runtime, "sparsity": sparsity, "origin": "trained", "microseconds": microseconds,
        "quartiles": [microseconds - 1, microseconds + 1], "file_bytes": 2048, "products": 5e6, **own,
    }  # fmt: skip


def trained(sparsity: float, weights: str, top1: float, microseconds: float) -> dict[str, Any]:
    return {
        "model": "resnet20", "dataset": "digits", "label": "", "sparsity": sparsity, "weights": weights, "top1": top1,
        "torch_top1": top1, "same_class": 100.0, "images": 10, "microseconds": microseconds, "library_bytes": 1024,
        "fastest_dense": "onnxruntime", "dense_microseconds": 400.0,
    }  # fmt: skip


def test_speed_is_over_the_fastest_dense_runtime() -> None:
    rows = [row("torch", 0.0, 900), row("onnxruntime", 0.0, 300), row("onnxruntime", 0.99, 100)]
    rows += [row("feather", 0.0, 400), row("feather", 0.99, 50)]
    part = {**SURROUNDINGS, "rows": rows, "missing": {"litert/0": "ImportError: none"}, "rounds": 7}
    text = deployment.markdown({"parts": {"resnet20": part}})
    assert "| resnet20 | 99 % | 10.00 | not measured | 6.00 |" in text
    assert "| resnet20 | 95 % | 3.50 | not measured | not measured |" in text
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    speeds = {(cells[0].strip(), cells[1].strip()): cells[4].strip() for cells in table}
    assert speeds["ONNX Runtime", "dense"] == "1.00"
    assert speeds["feather compile", "dense"] == "0.75"
    assert speeds["feather compile", "99 %"] == "6.00"
    assert "fastest dense runtime, ONNX Runtime" in text
    assert "Could not run: LiteRT (XNNPACK): ImportError: none." in text
    assert text.count("\nnot run\n") == 10  # three networks and seven parts


def test_accuracy_stands_beside_latency_and_size() -> None:
    rows = [trained(0.9, "fp32", 97.0, 80), trained(0.0, "fp32", 98.0, 400), trained(0.9, "int8", 96.5, 82)]
    evidence = {"parts": {"accuracy": {**SURROUNDINGS, "rows": rows}}}
    text = deployment.markdown(evidence)
    assert "| 400 (ONNX Runtime) | 5.00 |" in text
    data = deployment.picture_data(evidence)
    assert data is not None
    assert [point["top1"] for point in data["panels"]["resnet20 on digits"]["fp32 weights"]] == [98.0, 97.0]
    left, right = drawing.draw(data).axes
    assert left.get_xlabel() == "us per image, one core"
    assert sorted(right.lines[0].get_xdata()) == [1.0, 1.0]


def test_files_stand_beside_their_bound_and_outputs_beside_pytorch() -> None:
    sizes = {"dense": 4096, "dense_compressed": 3072, "file": 1024, "index": 106, "index_bound": 100.0}
    files = [{"model": "resnet20", "sparsity": 0.9, "values": "fp32", **sizes}]
    common = {"model": "resnet20", "sparsity": 0.9, "images": 8}
    outputs = [
        {**common, "target": "avx512", "executed": "Bochs", "difference": 3e-7},
        {**common, "target": "neon", "executed": "QEMU", "difference": 2e-6},
    ]
    text = deployment.markdown({"parts": {"files": {"rows": files}, "outputs": {"rows": outputs}}})
    assert "| 4.0 | 0 | 1.060 |" in text
    assert "| resnet20 | 90 % | 8 | 3.0e-07 | 2.0e-06 |" in text
    assert "Executed: avx512 on Bochs; neon on QEMU." in text


def test_without_accuracy_there_is_no_picture() -> None:
    assert deployment.picture_data({"parts": {}}) is None
