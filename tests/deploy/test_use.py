"""The Python binding, the command line, the C example, and the sentences for what cannot be done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from feather.deploy import DeployError, compile_model, costs, generate, load
from feather.deploy.cli import main
from feather.deploy.costs import convolution, linear_is_sparse
from feather.deploy.layout import Grid
from feather.deploy.targets import TARGETS, get_target
from models import create_model
from tests.deploy.networks import every_layer
from tests.deploy.tools import assert_close, digits, needs_compiler, reference, settle, sparsify

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
model: {name: resnet20, options: {width: 4}}
dataset: {name: digits, image_size: null}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of train.py, as far as this package reads it."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("run")
    model = settle(sparsify(create_model("resnet20", num_classes=10, width=4), 0.9), digits(8, 16))
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.yaml").write_text(CONFIG)
    return directory


def model_of(run: Path) -> nn.Module:
    from safetensors.torch import load_file

    model = create_model("resnet20", num_classes=10, width=4)
    model.load_state_dict(load_file(run / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def library(run: Path) -> Path:
    needs_compiler()
    directory = run / "build"
    assert main(["compile", str(run), "-o", str(directory), "--name", "model", "--batch", "2"]) == 0
    return directory / "model.so"


def test_numpy_in_and_out(run: Path, library: Path) -> None:
    images = digits(5, 16)  # not a multiple of the batch
    compiled = load(library)
    assert compiled.info["target"] == get_target("native").name
    assert_close(compiled(images.numpy()), reference(model_of(run), images))
    assert compiled(np.zeros((0, 3, 16, 16))).shape == (0, 10)
    with pytest.raises(DeployError, match=r"takes images of shape \(count, 3, 16, 16\)"):
        compiled(np.zeros((3, 16, 16), np.float32))
    with pytest.raises(DeployError, match="takes images of shape"):
        compiled(np.zeros((1, 3, 16, 15), np.float32))


def test_a_library_compiled_again_is_loaded_again(tmp_path: Path) -> None:
    needs_compiler()
    images = torch.randn(1, 3, 4, 4)
    for _ in range(2):
        model = nn.Conv2d(3, 2, 1)
        done = compile_model(model, (3, 4, 4), tmp_path)
        assert done.library is not None
        assert_close(load(done.library)(images.numpy()), reference(model, images))


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="cannot be read"):
        load(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(DeployError, match="no library built by feather compile"):
        load(tmp_path / "text.so")


def test_classify_names_classes(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20)).save(tmp_path / "image.png")
    (tmp_path / "labels").write_text("\n".join("abcdefghij"))
    assert main(["classify", str(library), str(tmp_path / "image.png"), "--labels", str(tmp_path / "labels")]) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert all(line.split()[-1] in "abcdefghij" for line in lines)
    assert main(["classify", str(library), str(library)]) == 2
    assert "no readable image" in capsys.readouterr().err


def test_the_c_example_agrees(run: Path, tmp_path: Path) -> None:
    needs_compiler()
    from PIL import Image

    compile_model(
        model_of(run), (3, 16, 16), tmp_path, target="c", library=False, normalization=((0.3058,) * 3, (0.3190,) * 3)
    )
    program = tmp_path / "classify"
    source = ROOT / "examples" / "deploy" / "classify.c"
    command = ["cc", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", str(source), str(tmp_path / "model.c")]
    subprocess.run([*command, "-o", str(program)], check=True)
    images = digits(1, 16) * 0.3190 + 0.3058
    pixels = (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.ppm")
    done = subprocess.run([str(program), str(tmp_path / "image.ppm")], capture_output=True, text=True, check=True)
    exact = (torch.from_numpy(pixels).float().permute(2, 0, 1)[None] / 255 - 0.3058) / 0.3190
    scores = reference(model_of(run), exact)[0]
    first = done.stdout.splitlines()[0].split()
    assert int(first[1]) == int(scores.argmax())
    assert float(first[3]) == pytest.approx(float(scores.max()), abs=1e-3)
    assert subprocess.run([str(program), str(source)], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("kind", ["safetensors", "bitmask", "onnx", "c"])
def test_export_writes_every_format(run: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suffix = {"bitmask": "feather"}.get(kind, kind)
    path = tmp_path / f"net.{suffix}"
    assert main(["export", str(run), "--format", kind, "-o", str(path), "--target", "c"]) == 0
    assert path.stat().st_size > 1000
    assert f"{path}  " in capsys.readouterr().out
    if kind == "bitmask":  # and what was written can be compiled
        arguments = ["compile", str(path), "--model", "resnet20", "--option", "width=4", "--num-classes", "10"]
        arguments += ["--shape", "3,16,16", "--no-library", "--target", "c", "-o", str(tmp_path), "--name", "again"]
        assert main(arguments) == 0
        expected = generate(model_of(run), (3, 16, 16), name="again", target="c").c
        assert (tmp_path / "again.c").read_text() == expected


def test_an_exported_program_compiles(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 8, 8),)), tmp_path / "net.pt2")
    arguments = ["--format", "c", "--target", "c", "-o", str(tmp_path / "net.c")]
    assert main(["export", str(tmp_path / "net.pt2"), *arguments]) == 0
    body = generate(model, (3, 8, 8), name="net", target="c").c
    written = (tmp_path / "net.c").read_text()
    assert written.split("\n", 1)[1].replace("net compiled", "Sequential compiled") == body.split("\n", 1)[1]


def test_module_and_entry_point_say_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "feather.deploy", "compile", str(tmp_path / "missing")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("feather: ")
    assert done.stderr.count("\n") == 1
    assert "does not exist" in done.stderr


@pytest.mark.parametrize("inside", [True, False], ids=["repository", "elsewhere"])
def test_the_installed_command_builds_the_networks_of_the_repository(run: Path, inside: bool, tmp_path: Path) -> None:
    """A console script does not search the current directory for packages, unlike ``python -m``."""
    script = Path(sys.executable).with_name("feather")
    arguments = ["compile", str(run), "-o", str(tmp_path), "--name", "model", "--target", "c", "--no-library"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(script), *arguments],
        cwd=ROOT if inside else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.c").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compile", "RUN", "-o", "/proc/none", "--no-library"], "/proc/none cannot be written"),
        (["export", "RUN", "--format", "bitmask", "-o", "/proc/none/file"], "/proc/none cannot be written"),
        (["export", "RUN", "--format", "c", "--target", "c", "-o", "a-b.c"], "a-b.c is not a_b.c"),
        (["export", "RUN", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["compile", "RUN", "--batch", "0"], "'0' is no count: expected at least 1"),
        (["compile", "RUN", "--shape", "3,x"], "'3,x' is no shape"),
        (["compile", "RUN", "--option", "width"], "'width' is no option"),
        (["compile", "RUN/model.safetensors"], "add --model, --num-classes and --shape"),
        (["classify", "RUN/model.safetensors", "image.png"], "no library built by feather compile"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    run: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([argument.replace("RUN", str(run)) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("feather: ")
    assert error.count("\n") == 1
    assert sentence in error


class Reads(nn.Module):
    """One layer behind a function."""

    def __init__(self, layer: nn.Module, function: object = None) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.function(x) if callable(self.function) else x


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Reads(nn.GELU()), r"Layer layer \(GELU\) computes gelu"),
        (Reads(nn.ConvTranspose2d(3, 3, 2)), r"Layer layer \(ConvTranspose2d\) computes conv_transpose2d"),
        (Reads(nn.Linear(8, 2)), r"Layer layer \(Linear\) is a Linear on a map"),
        (Reads(nn.BatchNorm2d(3, track_running_stats=False)), "Layer layer"),
        (Reads(nn.AdaptiveAvgPool2d(3)), "which does not divide it"),
        (Reads(nn.Identity(), lambda x: torch.cat([x, x], 2)), "concatenates along dimension 2"),
        (Reads(nn.Identity(), lambda x: x * 2), "computes mul"),
        (Reads(nn.Identity(), lambda x: (x, x)), "expected one tensor"),
        (Reads(nn.Identity()), "returns its input"),
        (Reads(nn.Identity(), lambda x: x.numpy()), "cannot be captured"),
        (Reads(nn.Identity(), lambda x: F.conv2d(x, x)), "computes its weights on the way"),
    ],
)
def test_unsupported_layers_are_named(model: nn.Module, sentence: str) -> None:
    with pytest.raises(DeployError, match=sentence) as caught:
        generate(model, (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Conv2d(3, 4, 3)
    for options, sentence in (
        ({"target": "sse"}, "Unknown target 'sse': use native, avx512"),
        ({"batch": 0}, "Batch 0"),
        ({"name": "a-b"}, "no C identifier"),
    ):
        with pytest.raises(DeployError, match=sentence):
            generate(model, (3, 8, 8), **options)  # type: ignore[arg-type]
    with pytest.raises(DeployError, match="expected \\(channels, height, width\\)"):
        generate(model, (8, 8))
    with pytest.raises(DeployError, match="cannot be captured for an input of shape"):
        generate(model, (4, 8, 8))
    with pytest.raises(DeployError, match="No C compiler found for target c \\(tried nothing\\)"):
        compile_model(model, (3, 8, 8), tmp_path, target="c", compiler="nothing")
    batch = torch.export.Dim("batch", min=2, max=8)
    dynamic = torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    with pytest.raises(DeployError, match="dynamic shapes"):
        generate(dynamic, (3, 8, 8))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, (3, 8, 8))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_work_grows_with_the_non_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(8, 16, 3, padding=1)
    sparsify(model, 0.75)
    info = generate(model, (8, 10, 10), target="c").info
    assert info["nonzeros"] == 16 * 8 * 9 // 4
    assert info["macs"] == 100 * 16 * 8 * 9 // 4


def test_kernels_follow_the_measured_costs() -> None:
    torch.manual_seed(0)
    for sparsity, kernel in ((0.0, "blocks of "), (0.95, "sparse")):
        model = sparsify(nn.Conv2d(16, 16, 3, padding=1), sparsity)
        text = generate(model, (16, 16, 16), target="avx2").c
        assert f"  {kernel}" in text.split("*/")[0]


@pytest.mark.parametrize("cheaper", [16, 8])
def test_vectors_are_as_wide_as_is_cheaper(cheaper: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def table(width: int) -> dict[str, dict[str, float]]:
        one = dict.fromkeys(("entry", "entry_vector", "group", "group_vector"), 1.0 if width == cheaper else 10.0)
        return dict.fromkeys(("1", "2", "4", "8"), one)

    tables = {"16": table(16), "8": table(8)}
    measured = {"between": tables, "aligned": tables, "shifted": {}, "linear": {"dense": 1.0, "sparse": 1.0}}
    monkeypatch.setattr(costs, "_measured", lambda target: measured)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    text = generate(model, (3, 8, 8), name="net", target="avx512").c
    assert {int(width) for width in re.findall(r"\bconv_(\d+)x", text)} == {cheaper}


@pytest.mark.parametrize("cheaper", ["shifted", "between"])
def test_sums_are_shifted_where_that_is_cheaper(cheaper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def tables(reading: str) -> dict[str, dict[str, dict[str, float]]]:
        one = dict.fromkeys(("entry", "entry_vector", "group", "group_vector"), 1.0 if reading == cheaper else 10.0)
        return {"16": dict.fromkeys(("1", "2", "4", "8"), one)}

    measured = {reading: tables(reading) for reading in costs.READINGS}
    monkeypatch.setattr(costs, "_measured", lambda target: measured)
    text = generate(nn.Conv2d(3, 8, 3, padding=1), (3, 16, 16), name="net", target="avx512").c
    assert ("shuffle16(e0" in text) == (cheaper == "shifted")
    long_rows = generate(nn.Conv2d(3, 8, 3, padding=1), (3, 4, 300), name="net", target="avx512").c
    assert "shuffle16(e0" not in long_rows  # a row of 19 vectors, twice, exceeds the registers


def test_every_target_has_costs() -> None:
    grids = {
        "between": Grid(1, 8, 8, 9, 9, 4),
        "aligned": Grid(1, 8, 8, 9, 9, 4),
        "shifted": Grid(1, 8, 4, 9, 4, 4, True),
    }
    for target in TARGETS.values():
        for reading, grid in grids.items():
            assert all(0 < convolution(target, grid, reading, block, 4, 100) < 1e6 for block in target.tiles)
        assert linear_is_sparse(target, 10_000, 10)
        assert not linear_is_sparse(target, 10_000, 9_000)


def test_channels_that_nobody_reads_cost_nothing() -> None:
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    with torch.no_grad():
        second.weight[:, 2] = 0
    info = generate(nn.Sequential(first, nn.ReLU(), second), (3, 8, 8), target="c").info
    assert info["nonzeros"] == 3 * 3 * 9 + 2 * 3 * 9


def test_clang_compiles_it_too(tmp_path: Path) -> None:
    if not shutil.which("clang"):
        pytest.skip("clang is not installed")
    model, images = every_layer(), digits(2, 13)
    done = compile_model(model, (3, 13, 13), tmp_path, compiler="clang")
    assert done.library is not None
    assert_close(load(done.library)(images.numpy()), reference(model, images))


def test_loading_the_library_does_not_load_this_package() -> None:
    code = "import sys, feather; print(*[name for name in sys.modules if name.startswith('feather.deploy')])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
