"""The generated C computes what PyTorch computes, and touches no memory but its own."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from feather.deploy.capture import capture
from feather.deploy.compiler import generate
from feather.deploy.emit import emit
from feather.deploy.fuse import fuse
from feather.deploy.graph import Conv, Linear
from feather.deploy.lower import lower
from feather.deploy.quantize import quantize
from models import create_model
from scripts.deploy import bochs
from scripts.deploy.program import ARM, build, buildable, instructions_per_image, run
from tests.deploy.networks import Case, every_layer, networks
from tests.deploy.tools import (
    NATIVE,
    SANITIZERS,
    assert_close,
    digits,
    needs_arm_tools,
    needs_compiler,
    photographs,
    reference,
    run_program,
    settle,
    sparsify,
)

# Each example runs a compiler: no shrinking, which would take minutes.
ALIGNED = st.sampled_from([None, True, False])
COMPILED = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


def check(model: nn.Module, images: Tensor, target: str, **options: object) -> None:
    """Against the network in float64: to 1e-5, or twice PyTorch's own fp32 error where a network loses more."""
    with tempfile.TemporaryDirectory() as directory:
        found = run_program(model, images, Path(directory), target, **options)  # type: ignore[arg-type]
    expected = reference(copy.deepcopy(model).double(), images.double())
    own = np.abs(reference(model, images) - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-6)
    assert_close(found, expected, max(1e-5, 2 * float(own)))


def small_images() -> Tensor:
    return digits(4, 13)[..., :11].contiguous()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("target", NATIVE)
def test_every_layer(target: str, aligned: bool) -> None:
    needs_compiler()
    flags = SANITIZERS if target == "c" else ("-O1",)
    check(every_layer(), small_images(), target, aligned=aligned, flags=flags)


@pytest.mark.parametrize(  # of rows: whole vectors, with a gap, less than one of AVX2
    ("width", "kernel"),
    [(16, 1), (16, 3), (16, 7), (13, 3), (13, 5), (3, 3)]
    + [pytest.param(*case, marks=pytest.mark.long) for case in ((16, 5), (13, 1), (13, 7), (3, 1), (3, 5), (3, 7))],
)
def test_sums_are_shifted_by_any_number_of_pixels(width: int, kernel: int) -> None:
    """Seven columns dilated by three look beyond both ends of every row, and across several vectors."""
    needs_compiler()
    torch.manual_seed(kernel)
    dilated = nn.Conv2d(3, 6, (1, kernel), padding=(0, 3 * (kernel // 2)), dilation=(1, 3))
    model = nn.Sequential(dilated, nn.ReLU(), nn.MaxPool2d((3, kernel), 1, (1, kernel // 2)), nn.Conv2d(6, 2, 3, 1, 1))
    for target in NATIVE:
        check(model.eval(), torch.randn(2, 3, 5, width), target, batch=2, aligned=True)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_dense_layers(density: float) -> None:
    needs_compiler()
    check(every_layer(density), small_images(), NATIVE[0], batch=2)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_nan_goes_through_max_pooling_as_in_pytorch(aligned: bool) -> None:
    needs_compiler()
    images = torch.randn(2, 3, 9, 14)
    images[0, 1, 4, 7] = images[1, 2, 0, 13] = float("nan")
    model = nn.MaxPool2d(3, 2, 1)
    for target in NATIVE:
        with tempfile.TemporaryDirectory() as directory:
            found = run_program(model, images, Path(directory), target, aligned=aligned)
        np.testing.assert_array_equal(found.reshape(2, 3, 5, 7), model(images).numpy())


def test_every_layer_on_arm() -> None:
    needs_arm_tools()
    check(every_layer(), small_images(), "neon", flags=("-O1", "-static"), emulator=ARM)


@pytest.mark.long
@pytest.mark.skipif(not bochs.available(), reason="Bochs or GRUB is not installed (see scripts/deploy/bochs.py)")
def test_every_layer_on_emulated_avx512(tmp_path: Path) -> None:
    source = generate(every_layer(), (3, 13, 11), name="net", target="avx512", batch=2)
    assert_close(bochs.run(source, small_images().numpy(), tmp_path), reference(every_layer(), small_images()))


@pytest.mark.parametrize("target", ["c", *(["avx2"] if "avx2" in NATIVE else [])])
def test_a_channel_that_hardly_varies_is_no_further_from_the_truth_than_in_pytorch(target: str) -> None:
    """BatchNorm divides such a channel by almost nothing, which amplifies the rounding of the convolution before it."""
    needs_compiler()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    images = photographs(4, 16)
    norm = model[1]
    with torch.no_grad():
        model[0].weight[:3] *= 1e-4  # almost constant: the bias
        before = model[0](images)
        norm.running_mean.copy_(before.mean((0, 2, 3)))
        norm.running_var.copy_(before.var((0, 2, 3)))
        norm.running_var[0] = 0.0
        exact = copy.deepcopy(model).double()(images.double()).numpy()
    with tempfile.TemporaryDirectory() as directory:
        found = run_program(model, images, Path(directory), target)
    assert np.abs(found - exact).max() <= 2 * np.abs(reference(model, images) - exact).max() + 1e-6


@settings(COMPILED, max_examples=3)
@given(networks(), st.sampled_from(NATIVE), st.sampled_from([1, 3]), st.sampled_from([None, 1, 2, 4]), ALIGNED)
def test_random_networks(case: Case, target: str, batch: int, block: int | None, aligned: bool | None) -> None:
    needs_compiler()
    check(case.model, case.images, target, batch=batch, block=block, aligned=aligned)


@pytest.mark.long
@settings(COMPILED, max_examples=150)
@given(networks(), st.sampled_from(NATIVE), st.sampled_from([1, 3]), st.sampled_from([None, 1, 2, 4]), ALIGNED)
def test_many_random_networks_under_sanitizers(
    case: Case, target: str, batch: int, block: int | None, aligned: bool | None
) -> None:
    needs_compiler()
    check(case.model, case.images, target, batch=batch, block=block, aligned=aligned, flags=SANITIZERS)


@pytest.mark.long
@settings(COMPILED, max_examples=40)
@given(networks(), st.sampled_from([1, 3]), st.sampled_from([None, 1, 2, 4]), ALIGNED)
def test_random_networks_on_arm(case: Case, batch: int, block: int | None, aligned: bool | None) -> None:
    needs_arm_tools()
    flags = ("-O1", "-static")
    check(case.model, case.images, "neon", batch=batch, block=block, aligned=aligned, flags=flags, emulator=ARM)


@pytest.mark.long
def test_sparser_networks_execute_fewer_instructions_on_arm(tmp_path: Path) -> None:
    needs_arm_tools()
    counts = {}
    for sparsity in (0.8, 0.98):
        torch.manual_seed(0)
        images = digits(4, 16)
        model = settle(sparsify(create_model("resnet20", num_classes=10, width=8), sparsity), images)
        source = generate(model, (3, 16, 16), name="net", target="neon")
        program = build(source, tmp_path, buildable("neon"), ("-O1", "-static"))
        counts[sparsity] = instructions_per_image(program, images.numpy(), source)
    assert 0 < counts[0.98] < counts[0.8] / 2


def with_and_without_rounding(model: nn.Module, images: Tensor, target: str, block: int | None) -> None:
    """int8 weights give what the same network gives whose float32 weights were rounded."""
    results = []
    for rounded in (False, True):
        graph = quantize(fuse(capture(model, tuple(images.shape[1:]))))
        for op in graph.ops:
            if rounded and isinstance(op, Conv | Linear) and op.scale is not None:
                op.weight = op.weight * op.scale.reshape(-1, *[1] * (op.weight.ndim - 1))
                op.scale = None
        source = emit(lower(graph, buildable(target), 1, block), "net", "net")
        with tempfile.TemporaryDirectory() as directory:
            program = build(source, Path(directory), buildable(target))
            results.append(run(program, images.numpy(), source)[0])
    assert_close(results[1], results[0])


def test_int8_computes_with_the_rounded_weights() -> None:
    needs_compiler()
    with_and_without_rounding(every_layer(), small_images(), NATIVE[0], None)


@pytest.mark.long
@settings(COMPILED, max_examples=20)
@given(networks(), st.sampled_from(NATIVE), st.sampled_from([None, 1, 4]))
def test_int8_of_random_networks(case: Case, target: str, block: int | None) -> None:
    needs_compiler()
    with_and_without_rounding(case.model, case.images, target, block)


def test_int8_takes_less_room() -> None:
    model = sparsify(nn.Conv2d(32, 32, 3, padding=1), 0.9)
    sources = {kind: generate(model, (32, 8, 8), target="c", weights=kind).info for kind in ("fp32", "int8")}
    assert sources["int8"]["constant_bytes"] < 0.65 * sources["fp32"]["constant_bytes"]  # type: ignore[operator]


def test_a_phase_may_need_more_zeros_before_it_than_its_neighbour_leaves() -> None:
    """Padding 4 at stride 3: the phases differ in how far they reach beyond the border."""
    needs_compiler()
    torch.manual_seed(0)
    for size in (5, 17):
        check(nn.Conv2d(5, 4, (4, 3), 3, 4, 2), torch.randn(3, 5, size, size + 1), "c", batch=3)


def test_threads_change_nothing(tmp_path: Path) -> None:
    needs_compiler()
    model, images = every_layer(), small_images()
    flags = ("-O1", "-fopenmp", "-DNET_THREADS=3")
    found = run_program(model, images, tmp_path, "c", flags=flags)
    np.testing.assert_array_equal(found, run_program(model, images, tmp_path, "c"))


@pytest.mark.long
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("target", [*NATIVE, "neon"])
@pytest.mark.parametrize(("name", "size"), [("resnet20", 32), ("mobilenet_v1", 32), ("densenet40_24", 33)])
def test_networks_of_the_paper(name: str, size: int, target: str, sparsity: float) -> None:
    on_photographs(name, 100, 4, size, target, sparsity)


@pytest.mark.long
@pytest.mark.parametrize("target", [*NATIVE, "neon"])
@pytest.mark.parametrize(("size", "sparsity"), [(224, 0.0), (224, 0.95), (224, 0.99), (161, 0.95)])
def test_resnet50(target: str, size: int, sparsity: float) -> None:
    on_photographs("resnet50", 1000, 2, size, target, sparsity)


def on_photographs(name: str, classes: int, count: int, size: int, target: str, sparsity: float) -> None:
    arm = target == "neon"
    needs_arm_tools() if arm else needs_compiler()
    torch.manual_seed(0)
    images = photographs(count, size)
    model = settle(sparsify(create_model(name, num_classes=classes), sparsity), images)
    if arm:
        check(model, images, target, flags=("-static",), emulator=ARM)
    else:
        check(model, images, target, flags=())
