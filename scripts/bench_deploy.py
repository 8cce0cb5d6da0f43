"""Latency, memory, size and loading time of sparse networks against dense runtimes, on one core.

    python scripts/bench_deploy.py prepare     compile and export everything below build/bench_deploy (no timing)
    python scripts/bench_deploy.py PART ...    measure; parts: resnet20 mobilenet_v1 densenet40_24 resnet50 footprint
                                               layers accuracy batches files outputs arm; `all` takes those missing

Every part is written to results/benchmarks/deploy.json when it is done, so an interrupted benchmark goes on where it
stopped; scripts/report.py makes the tables and the picture from it. ``--runs`` holds the trained networks
(docs/deployment.md says how they are trained), ``--data`` the data sets, ``TFLITE_PYTHON`` names a Python with
TensorFlow, which LiteRT's converter needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.records import environment, write_json  # noqa: E402
from feather.deploy import generate, load, save_weights  # noqa: E402
from feather.deploy.sparse_file import VALUES  # noqa: E402
from scripts.deploy import accuracy, batches, contenders, layers, outputs, program  # noqa: E402
from scripts.deploy.subjects import SHAPES, open_subject  # noqa: E402
from scripts.deploy.timing import TURN, interleave, summary  # noqa: E402

SPARSITIES = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99)
WORK = ROOT / "build" / "bench_deploy"
SECONDS = 20.0
"""Of interleaved timing for one network."""
BATCHED = [("resnet20", 0.95), ("mobilenet_v1", 0.95)]
LAYERS = [("resnet20", 0.0), ("resnet20", 0.95), ("resnet20", 0.99), ("mobilenet_v1", 0.99), ("resnet50", 0.99)]


def prepare(runs: Path) -> None:
    """Write every file that is measured; what is there already stays."""
    for name in SHAPES:
        for sparsity in SPARSITIES:
            directory = WORK / f"{name}-{sparsity:g}"
            if (directory / "files.json").exists():
                continue
            subject = open_subject(name, sparsity, runs)
            files = contenders.prepare(subject.model, subject.shape, directory, runtimes=sparsity in (0.0, 0.99))
            described = {"origin": subject.origin, "files": {key: path.name for key, path in files.items()}}
            described["info"] = load(files["feather"]).info
            write_json(directory / "files.json", described)
            print(f"{name} {sparsity:g}: {subject.origin}", flush=True)
    for name, sparsity in BATCHED:
        batches.build(open_subject(name, sparsity, runs), WORK / f"{name}-{sparsity:g}")
    for run in ARGUMENTS.trained:
        accuracy.prepare(run, WORK / "accuracy" / run.name)


def prepared(name: str, sparsity: float) -> tuple[dict[str, Any], dict[str, Path]]:
    directory = WORK / f"{name}-{sparsity:g}"
    try:
        described: dict[str, Any] = json.loads((directory / "files.json").read_text())
    except OSError:
        raise SystemExit(f"{directory} is not prepared: run scripts/bench_deploy.py prepare first") from None
    return described, {key: directory / file for key, file in described["files"].items()}


def latency(name: str) -> dict[str, Any]:
    """Median microseconds of every contender, interleaved."""
    image = np.random.default_rng(0).standard_normal((1, *SHAPES[name])).astype(np.float32)
    runs: dict[str, contenders.Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    reference = None
    for runtime, sparsity in [
        *((runtime, 0.0) for runtime in contenders.DENSE),
        ("onnxruntime", 0.99),
        ("litert_sparse", 0.99),
        *(("feather", sparsity) for sparsity in SPARSITIES),
    ]:
        described, files = prepared(name, sparsity)
        key = f"{runtime}/{sparsity:g}"
        try:
            run = contenders.contender(runtime, files[runtime])
            result = np.array(run(image))
        except (ImportError, KeyError, RuntimeError, ValueError) as error:
            missing[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if sparsity == 0.0:
            reference = result if reference is None else reference
            error_found = float(np.abs(result - reference).max() / np.abs(reference).max())
        else:
            error_found = None
        runs[key] = run
        info = described["info"]
        own = {"products": info["macs"], "nonzeros": info["nonzeros"], "weights": info["weights"]}
        rows[key] = {
            "runtime": runtime, "sparsity": sparsity, "origin": described["origin"],
            "difference": error_found, "file_bytes": files[runtime].stat().st_size, **own,
        }  # fmt: skip
        if runtime == "feather":
            rows[key] |= {"bitmask_bytes": files["bitmask"].stat().st_size, "workspace_bytes": info["workspace_bytes"]}
            rows[key] |= {"target": info["target"]}
    times = interleave(runs, image, SECONDS)
    for key, row in rows.items():
        row |= summary(times[key])
        print(f"{name:14} {key:22} {row['microseconds']:10.0f} us", flush=True)
    rounds = len(next(iter(times.values()))) // TURN
    return {"rounds": rounds, "rows": list(rows.values()), "missing": missing}


def footprint() -> dict[str, Any]:
    """Peak memory and loading time, each in a process of its own."""
    script = ROOT / "scripts" / "deploy" / "footprint.py"
    rows = []
    for name in SHAPES:
        for runtime, sparsity in [
            *((runtime, 0.0) for runtime in contenders.DENSE),
            *(("feather", sparsity) for sparsity in SPARSITIES),
        ]:
            described, files = prepared(name, sparsity)
            if runtime not in files or (runtime == "torch_compiled" and name != "resnet20"):
                continue  # compiling takes a minute and tells nothing of memory
            command = [sys.executable, str(script), runtime, str(files[runtime]), json.dumps(SHAPES[name])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if runtime == "feather":
                found["program_bytes"] = program_peak(WORK / f"{name}-{sparsity:g}", described["info"])
            rows.append({"model": name, "runtime": runtime, "sparsity": sparsity, **found})
            print(name, runtime, sparsity, found, flush=True)
    return {"rows": rows}


def program_peak(directory: Path, info: dict[str, Any]) -> int:
    """Peak resident set in bytes of a C program that loads the library and runs one image."""
    sizes = {"NAME": info["name"], "WORKSPACE": info["workspace_bytes"]}
    sizes |= {"INPUT": int(np.prod(info["input_shape"])), "OUTPUT": int(np.prod(info["output_shape"]))}
    macros = [f"-D{key}={value}" for key, value in sizes.items()]
    harness = ROOT / "scripts" / "deploy" / "harness.c"
    executable = directory / "program"
    command = ["cc", "-O1", "-DPEAK", *macros, str(harness), str(directory / "net.so"), f"-Wl,-rpath,{directory}"]
    subprocess.run([*command, "-o", str(executable)], check=True)
    image = directory / "image"
    image.write_bytes(bytes(4 * sizes["INPUT"]))
    done = subprocess.run([str(executable), "1", str(image), str(directory / "scores")], capture_output=True, text=True)
    return 1024 * int(done.stdout.split()[1])


def measure_layers() -> dict[str, Any]:
    return {"rows": [layers.measure(*which, open_subject(*which, ARGUMENTS.runs), WORK) for which in LAYERS]}


def measure_accuracy() -> dict[str, Any]:
    """Finished runs that ``--trained`` names."""
    found = [accuracy.measure(run, ARGUMENTS.data, WORK / "accuracy" / run.name) for run in ARGUMENTS.trained]
    return {"rows": [row for rows in found for row in rows]}


def measure_batches() -> dict[str, Any]:
    rows = []
    for name, sparsity in BATCHED:
        _, files = prepared(name, 0.0)
        subject = open_subject(name, sparsity, ARGUMENTS.runs)
        rows += batches.measure(name, sparsity, subject, files["onnxruntime"], WORK / f"{name}-{sparsity:g}")
    return {"rows": rows, "cores": os.cpu_count()}


def files() -> dict[str, Any]:
    """Bytes of the compressed files beside the dense ones and the bound."""
    rows = []
    for name in SHAPES:
        for sparsity in SPARSITIES:
            subject = open_subject(name, sparsity, ARGUMENTS.runs)
            for values in VALUES:
                sizes = save_weights(subject.model, WORK / "net.feather", values=values)
                rows.append({"model": name, "sparsity": sparsity, "origin": subject.origin, "values": values})
                rows[-1] |= asdict(sizes)
    return {"rows": rows}


def measure_outputs() -> dict[str, Any]:
    rows = []
    for name in SHAPES:
        for sparsity in (0.0, 0.9, 0.99):
            subject = open_subject(name, sparsity, ARGUMENTS.runs)
            rows += outputs.measure(name, sparsity, subject, ARGUMENTS.data, WORK / "outputs")
    return {"rows": rows}


def arm() -> dict[str, Any]:
    """Instructions per image on ARM64, under emulation."""
    rows = []
    for name in ("resnet20", "mobilenet_v1", "densenet40_24"):
        for sparsity in SPARSITIES:
            subject = open_subject(name, sparsity, ARGUMENTS.runs)
            directory = WORK / "arm"
            directory.mkdir(parents=True, exist_ok=True)
            source = generate(subject.model, subject.shape, name="net", target="neon")
            built = program.build(source, directory, program.buildable("neon"), ("-static",))
            images = np.random.default_rng(0).standard_normal((2, *subject.shape)).astype(np.float32)
            program.run(built, images[:1], source, program.ARM)
            count = program.instructions_per_image(built, images, source)
            rows.append({"model": name, "sparsity": sparsity, "instructions": count, "products": source.info["macs"]})
            print(rows[-1], flush=True)
    return {"rows": rows}


PARTS = {
    **dict.fromkeys(SHAPES, None), "footprint": footprint, "layers": measure_layers, "accuracy": measure_accuracy,
    "batches": measure_batches, "files": files, "outputs": measure_outputs, "arm": arm,
}  # fmt: skip


def main() -> None:
    global ARGUMENTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "prepare", "all"], metavar="PART")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "deploy")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="finished runs of which accuracy is shown")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "deploy.json")
    ARGUMENTS = parser.parse_args()
    evidence = json.loads(ARGUMENTS.out.read_text()) if ARGUMENTS.out.exists() else {"format": 1, "parts": {}}
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    wanted = [part for part in PARTS if part not in evidence["parts"]] if "all" in ARGUMENTS.parts else ARGUMENTS.parts
    if "prepare" in ARGUMENTS.parts or "all" in ARGUMENTS.parts:
        prepare(ARGUMENTS.runs)
    surroundings = environment()  # before the evidence itself changes
    for part in wanted:
        if part in PARTS:
            measure = PARTS[part]
            measured = latency(part) if measure is None else measure()
            versions = {runtime: contenders.version(runtime) for runtime in contenders.DENSE}
            evidence["parts"][part] = {**surroundings, "runtimes": versions, **measured}
            write_json(ARGUMENTS.out, evidence)


if __name__ == "__main__":
    main()
