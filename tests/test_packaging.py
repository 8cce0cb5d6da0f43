import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import find_packages

import feather

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch"}


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return content


def requirements() -> dict[str, Requirement]:
    """Every requirement of the library, [lab], [dev] and the build, by name."""
    content = project()
    extras = content["project"]["optional-dependencies"]
    lines = [*content["project"]["dependencies"], *extras["lab"], *extras["dev"], *content["build-system"]["requires"]]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def lock() -> dict[str, Version]:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), (
        "the lock holds names and versions only"
    )
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def files() -> list[Path]:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_library_needs_torch_alone() -> None:
    assert [Requirement(line).name for line in project()["project"]["dependencies"]] == ["torch"]


def test_only_the_library_is_packaged() -> None:
    tool = project()["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=tool["packages"]["find"]["include"])
    assert "feather" in found
    assert {name.partition(".")[0] for name in found} == {"feather"}
    assert (ROOT / "feather" / "py.typed").exists()
    assert "py.typed" in tool["package-data"]["feather"]


def test_the_lock_satisfies_pyproject() -> None:
    versions = lock()
    for name, requirement in requirements().items():
        assert name in versions, f"{name} is not locked: run `make lock`"
        assert versions[name] in requirement.specifier, (
            f"{name} {versions[name]} is outside {requirement}: run `make lock`"
        )


def test_conda_and_pip_ask_for_the_same() -> None:
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {}
    from_pip = [line for entry in entries if isinstance(entry, dict) for line in entry["pip"] if line != "-e ."]
    for entry in [*entries, *from_pip]:
        if isinstance(entry, str) and not entry.startswith("python=") and entry != "pip":
            requirement = Requirement(entry)
            conda[canonicalize_name(CONDA_NAMES.get(requirement.name, requirement.name))] = str(requirement.specifier)
    assert conda == {name: str(requirement.specifier) for name, requirement in requirements().items()}
    python = next(entry for entry in entries if isinstance(entry, str) and entry.startswith("python="))
    assert python.removeprefix("python=") in project()["project"]["requires-python"]


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Put together here, so that this file does not name them either.
    hosts = [
        "py" + "pi.org",
        "python" + "hosted",
        "anaconda" + ".org",
        "download.pytorch" + ".org",
        "--index" + "-url",
        "--find" + "-links",
    ]
    folders = [rf"(?<![\w.~-])/{name}/" for name in ("ro" + "ot", "ho" + "me", "wo" + "rk", "op" + "t", "Us" + "ers")]
    pattern = re.compile("|".join([*map(re.escape, hosts), "file" + "://", *folders]))
    found = []
    for path in files():
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # another test's, running beside this one
            continue
        if b"\0" in data[:4096]:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found


def test_importing_the_library_loads_nothing_of_the_laboratory() -> None:
    names = {
        "hydra",
        "omegaconf",
        "wandb",
        "timm",
        "torchvision",
        "sklearn",
        "matplotlib",
        "safetensors",
        "tqdm",
        "engine",
        "models",
    }
    # torch itself loads tqdm where it is installed; what counts is what feather adds.
    added = "sorted(sys.modules.keys() - before)"
    code = f"import sys, torch; before = set(sys.modules); import feather; print(*{added})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not names & set(done.stdout.split())


def test_training_needs_no_numpy_and_gives_the_same_bits_without_it() -> None:
    code = """
import hashlib, sys
if sys.argv[1] == "without":
    sys.modules["numpy"] = None  # importing it now fails
import torch, feather
from feather import operator
torch.manual_seed(0)
model = torch.nn.Linear(200, 200)  # large enough for the roots of the kept weights alone
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sparsifier = feather.create("feather", model, optimizer, sparsity=0.99, total_steps=20)
for _ in range(20):
    model(torch.randn(8, 200)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
sparsifier.finalize()
bits = model.weight.detach().view(torch.int32).flatten().tolist()
print(operator.numpy_reads_tensors(), sum(map(bool, bits)), hashlib.sha256(str(bits).encode()).hexdigest())
"""

    def outcome(numpy: str) -> list[str]:
        command = [sys.executable, "-W", "ignore", "-c", code, numpy]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    without, beside = outcome("without"), outcome("with")
    assert without[0] == "False"
    assert beside[0] == "True"
    assert without[1:] == beside[1:]
    assert beside[1] == str(40_000 - feather.zeros_at(0.99, 40_000))


def test_the_ci_command_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
