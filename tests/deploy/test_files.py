"""Compressed files: bit for bit, near the bound, and damaged ones are refused; ONNX files keep their zeros."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from feather.deploy import DeployError, load_weights, onnx_file, save_weights
from feather.deploy.capture import capture
from feather.deploy.fuse import fuse
from feather.deploy.indices import bound_bits, decode, encode
from models import create_model
from scripts.deploy.program import Floats
from tests.deploy.networks import Case, every_layer, networks
from tests.deploy.tools import assert_close, digits, reference, sparsify

CODECS = ["zlib", *(["zstd"] if importlib.util.find_spec("zstandard") else [])]


def same_bits(left: Tensor, right: Tensor) -> bool:
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and left.numpy().tobytes() == right.numpy().tobytes()


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 99))
def test_positions_come_back(size: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random(size) < share
    code, content = encode(mask)
    np.testing.assert_array_equal(decode(code, content, size), mask)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.999])
def test_positions_take_little_more_than_their_information(sparsity: float) -> None:
    mask = np.random.default_rng(0).random(300_000) >= sparsity
    _, content = encode(mask)
    assert 8 * len(content) <= 1.06 * bound_bits(mask.size, int(mask.sum()))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.98, 1.0])
def test_a_model_comes_back_bit_for_bit(sparsity: float, codec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparsify(create_model("resnet20", num_classes=10, width=8), sparsity)
    with torch.no_grad():
        model.fc.weight[0, :3] = torch.tensor([-0.0, float("nan"), float("-inf")])  # type: ignore[union-attr, index]
    state = {
        **model.state_dict(),
        "half": torch.randn(3, 2).bfloat16(),
        "none": torch.empty(0, 4),
        "flag": torch.ones(2) > 0,
    }
    sizes = save_weights(state, tmp_path / "model.feather", codec=codec)
    found = load_weights(tmp_path / "model.feather")
    assert list(found) == list(state)
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:
            assert same_bits(found[name].view(torch.int16), tensor.view(torch.int16))
        else:
            assert same_bits(found[name], tensor), name
    assert sizes.file == (tmp_path / "model.feather").stat().st_size
    if sparsity == 0.98:
        assert sizes.index <= 1.15 * sizes.index_bound
        assert sizes.file < min(sizes.dense_compressed, sizes.dense / 20)


@pytest.mark.parametrize(("values", "tolerance"), [("fp16", 5e-4), ("int8", 1 / 254)])
def test_rounded_values_stay_close_and_zeros_zero(values: str, tolerance: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Conv2d(16, 8, 3), 0.8)
    sizes = {kind: save_weights(model, tmp_path / kind, values=kind).file for kind in ("fp32", values)}
    weight, found = model.weight.detach(), load_weights(tmp_path / values)["weight"]  # type: ignore[union-attr, operator]
    largest = weight.abs().amax((1, 2, 3), keepdim=True)
    assert ((found - weight).abs() <= tolerance * largest + 1e-7).all()
    assert (found[weight == 0] == 0).all()
    assert sizes[values] < sizes["fp32"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.feather"
    save_weights(nn.Linear(40, 40), path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DeployError, match="damaged or truncated"):
        load_weights(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DeployError, match="damaged or truncated"):
        load_weights(path)
    path.write_bytes(b"something else")
    with pytest.raises(DeployError, match="no compressed file"):
        load_weights(path)
    with pytest.raises(DeployError, match="cannot be read"):
        load_weights(tmp_path / "missing")


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="not finite"):
        save_weights({"w": torch.full((2, 2), float("nan"))}, tmp_path / "x", values="int8")
    with pytest.raises(DeployError, match="range of fp16"):
        save_weights({"w": torch.full((2, 2), 1e9)}, tmp_path / "x", values="fp16")
    with pytest.raises(DeployError, match="use fp32, fp16, int8"):
        save_weights({}, tmp_path / "x", values="int4")


def test_onnx_keeps_every_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 5))
    model = sparsify(nn.Sequential(*layers), 0.9).eval()
    onnx_file.save(fuse(capture(model, (3, 6, 6))), tmp_path / "model.onnx")
    weights = onnx_file.weights(tmp_path / "model.onnx")
    found = sum(int((w == 0).sum()) for w in weights.values() if w.ndim > 1)
    kept = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert found >= sum(int((w == 0).sum()) for w in kept) > 0
    assert sum(w.size for w in weights.values() if w.ndim > 1) == sum(w.numel() for w in kept)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(DeployError, match="no ONNX file"):
        onnx_file.weights(tmp_path / "text")


def onnx_result(model: nn.Module, images: Tensor, directory: Path) -> Floats:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx_file.save(fuse(capture(model, tuple(images.shape[1:]))), directory / "model.onnx")
    session = runtime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": images.numpy()})
    return found


def test_onnx_computes_the_same(tmp_path: Path) -> None:
    images = digits(4, 13)
    assert_close(onnx_result(every_layer(), images, tmp_path), reference(every_layer(), images))


@pytest.mark.long
@settings(max_examples=60)
@given(networks())
def test_onnx_of_random_networks_computes_the_same(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    found = onnx_result(case.model, case.images, tmp_path_factory.mktemp("onnx"))
    assert_close(found, reference(case.model, case.images))
