"""Zeros and multiply-accumulates against numbers worked out by hand."""

import copy

import pytest
import torch
from torch import nn

from feather.report import count_flops, sparsity_report


def test_sparsity_report_counts_zeros_per_layer():
    weights = {"a": torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "b": torch.tensor([0.0, float("nan"), -0.0])}
    report = sparsity_report(weights, {"a": 0.5})
    assert [(x.name, x.shape, x.size, x.zeros, x.threshold) for x in report.layers] == [
        ("a", (2, 2), 4, 2, 0.5),
        ("b", (3,), 3, 2, None),
    ]
    assert (report.prunable, report.zeros, report.nonzeros) == (7, 4, 3)
    assert report.sparsity == 4 / 7
    assert report.as_dict()["layers"][0]["sparsity"] == 0.5
    text = str(report)
    assert "2 x 2" in text
    assert "50.00 %" in text
    assert "57.14 %" in text.splitlines()[-1]


def test_sparsity_report_of_nothing():
    report = sparsity_report({})
    assert (report.prunable, report.sparsity) == (0, 0.0)
    assert "total" in str(report)


def test_sparsity_report_waits_for_the_device_once(monkeypatch):
    waits = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("item() waits for the device"))
    sparsity_report({str(i): torch.ones(3) for i in range(5)})
    assert len(waits) == 1


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        # output positions x weights
        (nn.Conv1d(3, 4, 3), (3, 11), 9 * 4 * 3 * 3),
        (nn.Conv2d(3, 8, 3, padding=1), (3, 7, 5), 35 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 7, 5), 4 * 3 * 8 * 3 * 9),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 9, 9), 81 * 6 * 9),
        (nn.Conv2d(6, 4, 1, groups=2), (6, 3, 3), 9 * 4 * 3),
        (nn.Conv2d(2, 2, 3, dilation=2), (2, 9, 9), 25 * 2 * 2 * 9),
        (nn.Conv3d(2, 3, 2), (2, 4, 5, 6), 3 * 4 * 5 * 3 * 2 * 8),
        # input positions x weights
        (nn.ConvTranspose1d(3, 2, 4, stride=2), (3, 5), 5 * 3 * 2 * 4),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 3), 15 * 4 * 3 * 9),
        (nn.ConvTranspose3d(1, 2, 2), (1, 2, 3, 4), 24 * 1 * 2 * 8),
        # tokens x weights
        (nn.Linear(5, 7), (5,), 35),
        (nn.Linear(5, 7), (11, 5), 11 * 35),
        (nn.BatchNorm2d(3), (3, 4, 4), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_layer(layer, shape, expected, batch):
    flops = count_flops(layer, torch.randn(batch, *shape))
    assert (flops.dense, flops.sparse) == (expected, expected)


def test_embedding_is_free():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    assert count_flops(model, torch.zeros(2, 6, dtype=torch.long)).layers == {"1.weight": (6 * 8, 6 * 8)}


def test_grows_linearly_with_nonzeros_at_each_layers_own_size():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AvgPool2d(2), nn.Conv2d(2, 4, 1))
    inputs = torch.randn(2, 1, 6, 6)
    sparse = []
    with torch.no_grad():
        for i in range(4):
            model[2].weight[i].zero_()
            sparse.append(count_flops(model, inputs).sparse)
        model[0].weight[0].zero_()
        sparse.append(count_flops(model, inputs).sparse)
    # conv 0: 36 positions, 2 weights; conv 2: 9 positions, 2 weights per filter
    assert sparse == [72 + 54, 72 + 36, 72 + 18, 72, 36]
    assert count_flops(model, inputs).dense == 72 + 72


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.first(x)))


def test_every_use_of_a_tied_weight_counts_under_its_first_name():
    model = Tied()
    with torch.no_grad():
        model.first.weight[0].zero_()
    assert count_flops(model, torch.randn(5, 4)).layers == {"first.weight": (48, 36)}


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_counts_its_packed_projections(batch_first):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x, context):
            if not batch_first:
                x, context = x.transpose(0, 1), context.transpose(0, 1)
            return self.attention(x, key=context, value=context)[0]

    model = Attention()
    with torch.no_grad():
        model.attention.in_proj_weight[8:16].zero_()  # the key's projection
    flops = count_flops(model, torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    assert flops.layers == {
        "attention.in_proj_weight": (64 * (5 + 3 + 3), 64 * (5 + 3)),
        "attention.out_proj.weight": (64 * 5, 64 * 5),
    }


def test_attention_with_separate_projections():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    flops = count_flops(attention, torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 4))
    assert flops.dense == 64 * 5 + 48 * 3 + 32 * 3 + 64 * 5


def test_fused_transformer_layer_counts_all_of_its_parts():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    flops = count_flops(nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 8))
    assert flops.dense == 2 * 5 * (4 * 64 + 2 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_model_is_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    inputs = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    count_flops(model, inputs)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True]
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_hooks_and_modes_are_put_back_after_an_error():
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        count_flops(model, torch.randn(1, 4))
    assert model.training
    assert not model._forward_hooks


def test_computed_weight_goes_by_its_modules_name():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert count_flops(model, torch.randn(1, 3)).layers == {"0.weight": (6, 6)}


def test_compiled_model_counts_like_the_plain_one():
    model = nn.Linear(3, 2)
    assert count_flops(torch.compile(model), torch.randn(1, 3)).layers == {"weight": (6, 6)}


@pytest.mark.parametrize("inputs", [(), (torch.tensor(1.0),), (torch.zeros(0, 3),)])
def test_missing_example_is_refused(inputs):
    with pytest.raises(ValueError, match="example input"):
        count_flops(nn.Linear(3, 2), *inputs)


def test_resnet50_is_the_fields_4089_million():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.resnet50()
        flops = count_flops(model, torch.empty(1, 3, 224, 224))
    assert flops.dense == flops.sparse == 4_089_184_256
    assert flops.layers["fc.weight"] == (2_048_000, 2_048_000)
    assert "4,089,184,256" in str(flops)
