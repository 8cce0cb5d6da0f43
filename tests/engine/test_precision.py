import pytest
import torch

from engine import precision
from engine.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_each_format_trains_a_step(name: str, dtype: torch.dtype) -> None:
    chosen = resolve_precision(name, CPU)
    model = torch.nn.Linear(8, 4)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = chosen.scaler()
    with chosen.autocast():
        output = model(torch.ones(2, 8))
        loss = output.float().square().mean()
    assert output.dtype is dtype
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.dtype is torch.float32
    assert not torch.equal(model.weight, before)
    assert scaler.is_enabled() == (name == "fp16")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_cpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    chosen = resolve_precision("auto", CPU)
    assert chosen.name == expected
    assert chosen.reason.startswith(f"{expected}: the CPU {'has' if native else 'lacks'}")


def test_auto_on_a_cpu_leaves_depthwise_convolutions_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    plain, depthwise = torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 8, 3, groups=4)
    assert resolve_precision("auto", CPU, torch.nn.Sequential(plain)).name == "bf16"
    chosen = resolve_precision("auto", CPU, torch.nn.Sequential(plain, depthwise))
    assert (chosen.name, chosen.reason) == ("fp32", "fp32: depthwise convolutions are slower in bf16 on a CPU")
    assert resolve_precision("bf16", CPU, depthwise).name == "bf16"  # as asked


def test_the_cpu_is_asked_without_torch_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = precision.cpu_has_bf16()
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert precision.cpu_has_bf16() == by_torch


def test_bf16_on_a_cpu_that_emulates_it_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    chosen = resolve_precision("bf16", CPU)
    assert chosen.name == "bf16"
    assert "many times as long as with trainer.precision=fp32" in chosen.reason
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert resolve_precision("bf16", CPU).reason == "bf16: as asked"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer.precision=fp8 is unknown: choose auto, fp32, bf16 or fp16"):
        resolve_precision("fp8", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_auto_follows_the_gpu() -> None:
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert resolve_precision("auto", torch.device("cuda")).name == ("bf16" if native else "fp32")
