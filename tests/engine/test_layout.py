"""Networks in which oneDNN would corrupt memory are not laid out channels_last on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models.factory
from engine.layout import choose_layout
from models import create_model
from tests.train_helpers import start

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("convolution", "expected"),
    [
        (nn.Conv2d(7, 14, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(4, 8, 1, stride=(1, 2)), torch.contiguous_format),
        (nn.Conv2d(8, 16, 1, stride=2), torch.channels_last),
        (nn.Conv2d(4, 8, 1), torch.channels_last),
        (nn.Conv2d(4, 8, 3, stride=2), torch.channels_last),
    ],
)
def test_only_strided_1x1_convolutions_of_few_channels_keep_a_network_in_nchw(
    convolution: nn.Module, expected: torch.memory_format
) -> None:
    model = nn.Sequential(nn.ReLU(), convolution)
    layout, reason = choose_layout(True, CPU, model)
    assert layout is expected
    assert ("gradient of 1" in reason) is (expected is torch.contiguous_format)
    assert choose_layout(True, GPU, model) == (torch.channels_last, "channels_last")
    assert choose_layout(False, CPU, model) == (torch.contiguous_format, "NCHW")


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1", "densenet40_24"])
def test_the_papers_networks_are_not_concerned(name: str) -> None:
    assert choose_layout(True, CPU, create_model(name, num_classes=10)) == (torch.channels_last, "channels_last")


@pytest.mark.parametrize(("width", "layout"), [(4, torch.contiguous_format), (8, torch.channels_last)])
def test_weights_and_images_of_a_run_have_that_layout(
    width: int, layout: torch.memory_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[torch.Tensor] = []

    class Watched(models.factory.OURS["resnet20"]):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend([] if seen else [x, self.layer1[0].conv1.weight])
            return super().forward(x)

    monkeypatch.setitem(models.factory.OURS, "resnet20", Watched)
    monkeypatch.chdir(tmp_path)
    start(f"model.options.width={width}", "trainer.max_steps=1")
    assert len(seen) == 2
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in seen)
    assert ("gradient of layer2.0.shortcut.0" in capsys.readouterr().out) is (width == 4)
