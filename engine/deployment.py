"""What ``scripts/bench_deploy.py`` measured, as a page of tables and as the data of a picture."""

from __future__ import annotations

import textwrap
from typing import Any

from engine import tables
from engine.picture import Data
from engine.tables import markdown_rows, percent

NETWORKS = ("resnet20", "mobilenet_v1", "densenet40_24", "resnet50")
GOALS = (
    ("resnet20", 0.99, 10.0), ("resnet20", 0.95, 3.5), ("resnet20", 0.9, 2.2), ("mobilenet_v1", 0.99, 4.0),
    ("densenet40_24", 0.99, 4.0), ("resnet50", 0.99, 4.0), ("resnet50", 0.95, 2.0),
    *((name, 0.8, 1 / 1.1) for name in NETWORKS),
)  # fmt: skip
"""Speed over the fastest dense runtime, at least, on one core with AVX-512."""
NAMES = {
    "torch": "PyTorch eager",
    "torch_compiled": "PyTorch compiled",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "litert": "LiteRT (XNNPACK)",
    "litert_sparse": "LiteRT (XNNPACK), sparse file",
    "feather": "feather compile",
}


def markdown(evidence: dict[str, Any]) -> str:
    """``results/tables/deployment.md``: every part that was measured; a part without evidence says so."""
    parts = evidence["parts"]
    blocks = [
        tables.marker("results/benchmarks/deploy.json"),
        "# Deployment",
        "Batch 1, fp32, one thread pinned to one core; times are medians of interleaved runs. What the columns mean "
        "and how to repeat it: [docs/deployment.md](../../docs/deployment.md); [evidence](../benchmarks/deploy.json).",
    ]
    blocks += ["## Goals", _goals(parts)]
    for name in NETWORKS:
        blocks += [f"## {name}", _latency(parts[name]) if name in parts else tables.NOT_RUN]
    for title, part, make in (
        ("Memory and loading time", "footprint", _footprint),
        ("Accuracy of the C code", "accuracy", _accuracy),
        ("Batches and threads", "batches", _batches),
        ("Files", "files", _files),
        ("Outputs against PyTorch", "outputs", _outputs),
        ("Where the time goes", "layers", _layers),
        ("ARM64 instructions", "arm", _arm),
    ):
        blocks += [f"## {title}", make(parts[part]) if part in parts else tables.NOT_RUN]
    return "\n\n".join(blocks) + "\n"


def _hardware(part: dict[str, Any]) -> str:
    versions = ", ".join(f"{NAMES[name]} {v}" for name, v in part["runtimes"].items() if name != "torch_compiled")
    return f"{part['hardware']['cpu']}; {versions}; commit {part['git_commit'][:10]}"


def _fastest_dense(part: dict[str, Any]) -> dict[str, Any]:
    dense = [row for row in part["rows"] if row["runtime"] != "feather" and row["sparsity"] == 0]
    found: dict[str, Any] = min(dense, key=lambda row: row["microseconds"])
    return found


def _goals(parts: dict[str, Any]) -> str:
    lines = []
    for name, sparsity, goal in GOALS:
        speeds = {}
        for row in parts.get(name, {"rows": []})["rows"]:
            if row["runtime"] == "feather" and row["sparsity"] == sparsity:
                speed = _fastest_dense(parts[name])["microseconds"] / row["microseconds"]
                speeds[row["target"]] = f"{speed:.2f}"
        measured = [speeds.get(target, "not measured") for target in ("avx512", "avx2")]
        lines.append([name, percent(sparsity), f"{goal:.2f}", *measured])
    header = ["network", "weights", "goal on AVX-512", "on AVX-512", "on AVX2"]
    return (
        "Speed over the fastest dense runtime on one core, batch 1. The goals are for a core with AVX-512; `make "
        f"bench-deploy` on such a machine fills its column.\n\n{markdown_rows(header, lines)}"
    )


def _latency(part: dict[str, Any]) -> str:
    rows = part["rows"]
    fastest = _fastest_dense(part)
    lines = []
    for row in rows:
        ours = row["runtime"] == "feather"
        lines.append([
            NAMES[row["runtime"]], "dense" if row["sparsity"] == 0 else percent(row["sparsity"]),
            f"{row['microseconds']:,.0f}", f"{row['quartiles'][0]:,.0f} to {row['quartiles'][1]:,.0f}",
            f"{fastest['microseconds'] / row['microseconds']:.2f}", _kib(row["file_bytes"]),
            f"{row['products'] / 1e6:.2f}" if ours else "",
        ])  # fmt: skip
    header = ["runtime", "weights", "us per image", "quartiles", "speed", "file, KiB", "million products"]
    target = next(row["target"] for row in rows if row["runtime"] == "feather")
    origins: dict[str, list[str]] = {}
    for row in rows:
        if row["runtime"] == "feather":
            origins.setdefault(row["origin"], []).append(percent(row["sparsity"]) if row["sparsity"] else "dense")
    from_where = "; ".join(f"{', '.join(levels)}: {origin}" for origin, levels in origins.items())
    text = (
        f"{_hardware(part)}; target {target}, {part['rounds']} rounds. Speed is over the fastest dense runtime, "
        f"{NAMES[fastest['runtime']]}. Weights by sparsity: {from_where}.\n\n{markdown_rows(header, lines)}"
    )
    missing = "; ".join(f"{NAMES[key.split('/')[0]]}: {why}" for key, why in part["missing"].items())
    return f"{text}\n\nCould not run: {missing}." if missing else text


def _footprint(part: dict[str, Any]) -> str:
    lines = [
        [
            row["model"], NAMES[row["runtime"]], "dense" if row["sparsity"] == 0 else percent(row["sparsity"]),
            f"{1e3 * row['load_seconds']:.1f}", f"{1e3 * row['first_seconds']:.1f}", _mib(row["imported_bytes"]),
            _mib(row["peak_bytes"] - row["imported_bytes"]),
            _mib(row["program_bytes"]) if "program_bytes" in row else "",
        ]
        for row in part["rows"]
    ]  # fmt: skip
    header = [
        "network",
        "runtime",
        "weights",
        "load, ms",
        "first image, ms",
        "import, MiB",
        "grows, MiB",
        "C program, MiB",
    ]
    return (
        f"{_hardware(part)}. Each in a Python process of its own: the peak resident set once the runtime is imported, "
        "and by how much it grows with loading and four images; for the C code also the peak of a whole C program, "
        f"which needs neither Python nor torch.\n\n{markdown_rows(header, lines)}"
    )


def _accuracy(part: dict[str, Any]) -> str:
    lines = [
        [
            row["model"], row["dataset"], row["label"], "dense" if row["sparsity"] == 0 else percent(row["sparsity"]),
            row["weights"], f"{row['torch_top1']:.2f}", f"{row['top1']:.2f}", f"{row['same_class']:.2f}",
            f"{row['microseconds']:,.0f}", f"{row['dense_microseconds']:,.0f} ({NAMES[row['fastest_dense']]})",
            f"{row['dense_microseconds'] / row['microseconds']:.2f}", _kib(row["library_bytes"]),
        ]
        for row in part["rows"]
    ]  # fmt: skip
    header = [
        "network", "data", "note", "weights", "stored as", "top-1 PyTorch", "top-1 C", "same class, %", "us per image",
        "fastest dense runtime, us", "speed", "library, KiB",
    ]  # fmt: skip
    count = max(row["images"] for row in part["rows"])
    return (
        f"{_hardware(part)}. Networks that finished runs trained, up to {count:,} images of the split that each run "
        "evaluated; the dense runtimes run the same weights, zeros included, interleaved.\n\n"
        f"{markdown_rows(header, lines)}"
    )


def _batches(part: dict[str, Any]) -> str:
    lines = [
        [
            row["model"], NAMES[row["runtime"]], percent(row["sparsity"]) if row["sparsity"] else "dense",
            str(row["batch"]), str(row["threads"]), f"{row['microseconds']:,.0f}",
        ]
        for row in part["rows"]
    ]  # fmt: skip
    header = ["network", "runtime", "weights", "batch", "threads", "us per image"]
    return f"{_hardware(part)}, {part['cores']} cores, of which one thread gets one.\n\n{markdown_rows(header, lines)}"


def _files(part: dict[str, Any]) -> str:
    lines = [
        [
            row["model"], "dense" if row["sparsity"] == 0 else percent(row["sparsity"]), row["values"],
            _kib(row["dense"]), _kib(row["dense_compressed"]), _kib(row["file"]), f"{row['dense'] / row['file']:.1f}",
            _kib(row["index"]), f"{row['index'] / row['index_bound']:.3f}" if row["sparsity"] else "-",
        ]
        for row in part["rows"]
    ]  # fmt: skip
    header = [
        "network", "weights", "values", "dense", "dense, zstd", "file", "times smaller", "its index", "index / bound",
    ]  # fmt: skip
    return (
        "`feather export --format bitmask`, KiB. The bound is log2 C(weights, non-zeros) of each tensor.\n\n"
        f"{markdown_rows(header, lines)}"
    )


def _outputs(part: dict[str, Any]) -> str:
    targets = list(dict.fromkeys(row["target"] for row in part["rows"]))
    cells: dict[tuple[str, float, int], dict[str, str]] = {}
    for row in part["rows"]:
        found = cells.setdefault((row["model"], row["sparsity"], row["images"]), {})
        found[row["target"]] = f"{row['difference']:.1e}"
    lines = [
        [model, percent(sparsity) if sparsity else "dense", str(images), *(found.get(t, "not run") for t in targets)]
        for (model, sparsity, images), found in cells.items()
    ]
    how = "; ".join(f"{row['target']} on {row['executed']}" for row in {r["target"]: r for r in part["rows"]}.values())
    return (
        "Largest difference from PyTorch's outputs over the largest output, on photographs of a test split (CIFAR-100, "
        f"for resnet50 Imagenette). Executed: {how}.\n\n"
        f"{markdown_rows(['network', 'weights', 'images', *targets], lines)}"
    )


def _layers(part: dict[str, Any]) -> str:
    blocks = [
        f"{_hardware(part)}. The floor of a convolution is the time of its vector loads and multiply-adds at two of "
        "each per cycle; lanes in use says which share of their products is of a pixel and a non-zero weight (the rest "
        "are gaps between rows and zeros within blocks)."
    ]
    for run in part["rows"]:
        total = sum(step["microseconds"] for step in run["steps"])
        kinds: dict[str, list[float]] = {}
        for step in run["steps"]:
            kind = kinds.setdefault(step["kind"], [0.0, 0.0])
            kind[0] += step["microseconds"]
            kind[1] += step.get("floor", 0.0)
        shares = [
            [kind, f"{time:.1f}", f"{100 * time / total:.0f} %", f"{floor:.1f}" if floor else ""]
            for kind, (time, floor) in sorted(kinds.items(), key=lambda item: -item[1][0])
        ]
        heaviest = sorted(run["steps"], key=lambda step: -step["microseconds"])[:8]
        steps = [
            [
                step["layer"], step["kind"], f"{step['microseconds']:.1f}",
                f"{step['floor']:.1f}" if "floor" in step else "",
                f"{100 * step['useful']:.0f} %" if "useful" in step else "",
            ]
            for step in heaviest
        ]  # fmt: skip
        sparsity = "dense" if run["sparsity"] == 0 else percent(run["sparsity"])
        blocks += [
            f"### {run['model']}, {sparsity}: {total:,.0f} us, cycle {run['cycle_nanoseconds']:.3f} ns",
            markdown_rows(["steps", "us", "share", "floor, us"], shares),
            markdown_rows(["slowest steps", "kind", "us", "floor, us", "lanes in use"], steps),
        ]
    return "\n\n".join(blocks)


def _arm(part: dict[str, Any]) -> str:
    lines = [
        [
            row["model"], "dense" if row["sparsity"] == 0 else percent(row["sparsity"]),
            f"{row['instructions'] / 1e6:.2f}", f"{row['products'] / 1e6:.2f}",
        ]
        for row in part["rows"]
    ]  # fmt: skip
    header = ["network", "weights", "million instructions per image", "million products"]
    return (
        "Target neon, executed under QEMU's user-mode emulation: instructions are counted, time is not measured.\n\n"
        f"{markdown_rows(header, lines)}"
    )


def picture_data(evidence: dict[str, Any]) -> Data | None:
    """Accuracy against latency and against the size of the library, a panel for each network; None without that."""
    rows = evidence["parts"].get("accuracy", {}).get("rows", [])
    panels: dict[str, dict[str, list[Data]]] = {}
    for row in sorted(rows, key=lambda row: row["sparsity"]):
        title = f"{row['model']} on {row['dataset']}" + (f" ({row['label']})" if row["label"] else "")
        lines = panels.setdefault(textwrap.fill(title, 60), {})
        lines.setdefault(f"{row['weights']} weights", []).append({
            "sparsity": row["sparsity"], "top1": row["top1"], "microseconds": row["microseconds"],
            "kib": row["library_bytes"] / 1024,
        })  # fmt: skip
    return {"figure": "deployment", "panels": panels} if panels else None


def _kib(size: float) -> str:
    return f"{size / 1024:,.0f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"
