"""Exactness of the quantile, and which weights are prunable."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import feather
from feather import selection

RATIOS = [1e-9, 0.001, 1 / 3, 0.5, 0.9, 0.95, 0.98, 0.995, 1 - 1e-6, math.nextafter(1, 0)]


def by_sorting(weights, sparsity):
    """The definition: sort everything, interpolate, stay below the upper neighbour."""
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    ordered = torch.cat([w.reshape(-1).to(dtype) for w in weights]).abs().sort().values
    position = (ordered.numel() - 1) * sparsity
    rank = math.floor(position)
    lower, upper = ordered[rank], ordered[min(rank + 1, ordered.numel() - 1)]
    threshold = torch.lerp(lower, upper, position - rank)
    if lower < upper:
        threshold = torch.minimum(threshold, torch.nextafter(upper, torch.zeros_like(upper)))
    return threshold


def assert_exact(weights, sparsity):
    ours, expected = feather.magnitude_quantile(weights, sparsity), by_sorting(weights, sparsity)
    assert ours.dtype == expected.dtype
    assert ours.ndim == 0
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


# ---- the quantile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 101, 100_000])
@pytest.mark.parametrize("sparsity", RATIOS)
def test_quantile_equals_sorting_bit_for_bit(size, sparsity):
    assert_exact([normal(size)], sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.98])
def test_quantile_over_weights_larger_than_a_chunk_and_many_small_ones(sparsity):
    large = selection._CHUNK + 12_345
    assert_exact(
        [normal(large), *(normal(7, 3, seed=i) for i in range(50)), normal(selection._CHUNK, seed=99)], sparsity
    )


@pytest.mark.parametrize("sparsity", RATIOS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.full((1000,), -0.25)],
        lambda: [torch.zeros(1000)],
        lambda: [torch.cat([torch.zeros(900), normal(100)])],
        lambda: [normal(1000) * 1e-42],  # denormals
        lambda: [torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])],
        lambda: [torch.cat([normal(1000), torch.tensor([math.inf, -math.inf])])],
        lambda: [normal(1000, dtype=torch.float64), normal(500, dtype=torch.float32, seed=1)],
        lambda: [normal(1000, dtype=torch.float64) * 1e-310],
        lambda: [normal(1000, dtype=torch.bfloat16), normal(1000, dtype=torch.float16, seed=1), normal(10, seed=2)],
        lambda: [normal(16, 8, 3, 3).to(memory_format=torch.channels_last), normal(40, 30, seed=1).t()],
        lambda: [normal(64, 64)[::2, ::3], normal(5, 6, 7, seed=1).permute(2, 0, 1), normal(1, 9).expand(4, 9)],
        lambda: [normal(100)[10:60], torch.tensor(0.5), torch.empty(0)],
    ],
    ids=["equal", "zeros", "mostly-zeros", "denormals", "extremes", "infinities", "fp64-mixed", "fp64-denormals",
         "half-mixed", "channels_last", "strided", "views"],
)  # fmt: skip
def test_quantile_of_awkward_weights(make, sparsity):
    assert_exact(make(), sparsity)


def test_channels_last_weights_are_read_in_place():
    weight = normal(16, 8, 3, 3).to(memory_format=torch.channels_last)
    assert selection._flat(weight).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("sparsity", RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_are_exact_even_among_adjacent_floats(sparsity, dtype):
    """Interpolation between neighbouring floats rounds up to the upper one unless it is held below."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    start = torch.tensor(0.05, dtype=dtype).view(integer)
    weight = (start + torch.randperm(1001, generator=torch.Generator().manual_seed(0))).to(integer).view(dtype)
    for signed in (weight, -weight):
        threshold = feather.magnitude_quantile([signed], sparsity)
        pruned = int((feather.p_threshold(signed, threshold) == 0).sum())
        assert pruned == feather.zeros_at(sparsity, 1001)


@given(sparsity=st.floats(1e-12, 1, exclude_max=True), size=st.integers(1, 3000), seed=st.integers(0, 100))
@settings(max_examples=60)
def test_zeros_are_exact_for_any_sparsity_and_size(sparsity, size, seed):
    weight = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).float() + 1
    threshold = feather.magnitude_quantile([weight], sparsity)
    assert int((weight <= threshold).sum()) == feather.zeros_at(sparsity, size)


def test_zeros_are_exact_over_weights_of_mixed_types():
    fp32 = normal(501).unique()
    fp64 = normal(500, seed=1).double() * (1 + 1e-12)
    for sparsity in torch.linspace(0.01, 0.99, 50).tolist():
        threshold = feather.magnitude_quantile([fp32, fp64], sparsity)
        pruned = sum(int((feather.p_threshold(w, threshold) == 0).sum()) for w in (fp32, fp64))
        assert pruned == feather.zeros_at(sparsity, fp32.numel() + fp64.numel())


def test_zeros_at_is_the_paper_rule():
    """The non-zeros of PAPER.md section 3."""
    for size, nonzeros in ((1_092_960, (109_296, 54_648, 21_860, 10_930)), (703_920, (70_392, 35_196, 14_079, 7_040))):
        got = tuple(size - feather.zeros_at(s, size) for s in (0.9, 0.95, 0.98, 0.99))
        assert all(abs(g - n) <= 1 for g, n in zip(got, nonzeros, strict=True))
    assert feather.zeros_at(0.0, 100) == 0


# ---- prunable weights -----------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 3)
        self.conv3 = nn.Conv3d(2, 3, 3)
        self.up1 = nn.ConvTranspose1d(2, 3, 3)
        self.up2 = nn.ConvTranspose2d(2, 3, 3)
        self.up3 = nn.ConvTranspose3d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.ln = nn.LayerNorm([3, 4])
        self.packed = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.split = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.embed = nn.Embedding(9, 4)
        self.token = nn.Parameter(torch.zeros(2, 2))
        self.head = nn.Linear(4, 9)


EVERYTHING = [
    "conv1.weight", "conv2.weight", "conv3.weight", "up1.weight", "up2.weight", "up3.weight",
    "packed.in_proj_weight", "packed.out_proj.weight",
    "split.q_proj_weight", "split.k_proj_weight", "split.v_proj_weight", "split.out_proj.weight", "head.weight",
]  # fmt: skip


def names(*args, **kwargs):
    return list(feather.prunable_parameters(*args, **kwargs))


def test_default_weights_of_every_layer_type():
    assert names(Zoo()) == EVERYTHING


def test_include_selects_among_the_defaults_and_opts_others_in_by_full_name():
    model = Zoo()
    assert names(model, include=["conv*"]) == ["conv1.weight", "conv2.weight", "conv3.weight"]
    assert names(model, include=["head"]) == ["head.weight"]  # the module's name
    assert names(model, include=["*"]) == EVERYTHING  # a wildcard opts nothing in
    assert names(model, include=["embed.weight", "token", "head.weight"]) == ["token", "embed.weight", "head.weight"]


def test_exclude_wins():
    kept = names(Zoo(), include=["conv*", "head"], exclude=["conv2", "*3.weight"])
    assert kept == ["conv1.weight", "head.weight"]
    assert names(Zoo(), exclude=["split*", "packed*", "up?", "conv[12]"]) == ["conv3.weight", "head.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["layer9.*", "Head", "head.weigth"])
def test_an_unmatched_pattern_is_named(argument, pattern):
    with pytest.raises(ValueError, match=f"^{argument}: the pattern '{pattern.replace('*', '.')}.*' matches no weight"):
        names(Zoo(), **{argument: ["head", pattern]})


def test_a_wildcard_that_only_meets_unprunable_weights_is_an_error():
    with pytest.raises(ValueError, match=r"'embed\*' matches no weight"):
        names(Zoo(), include=["embed*"])


def test_a_string_instead_of_a_list_is_refused():
    with pytest.raises(ValueError, match=r"exclude='head' is a string: give a list"):
        names(Zoo(), exclude="head")


def test_nothing_prunable_is_an_error():
    with pytest.raises(ValueError, match="Nothing is prunable"):
        names(nn.Sequential(nn.BatchNorm1d(3), nn.Embedding(4, 4)))
    with pytest.raises(ValueError, match="Nothing is prunable"):
        names(nn.Linear(2, 2), exclude=["*"])


def tied(embedding_first):
    model = nn.Module()
    pair = [("embed", nn.Embedding(9, 4)), ("head", nn.Linear(4, 9, bias=False))]
    for name, module in pair if embedding_first else pair[::-1]:
        model.add_module(name, module)
    model.other = nn.Linear(4, 4)
    model.head.weight = model.embed.weight
    return model


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_linear_tied_to_an_embedding_is_left_to_the_opt_in(embedding_first):
    model = tied(embedding_first)
    assert names(model) == ["other.weight"]
    for alias in ("embed.weight", "head.weight", "head"):
        (name, weight), *rest = feather.prunable_parameters(model, include=[alias]).items()
        assert weight is model.embed.weight
        assert name == ("embed.weight" if embedding_first else "head.weight")
        assert not rest


def test_tied_linears_are_one_entry_and_answer_to_both_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    assert names(model) == ["0.weight", "2.weight"]
    assert names(model, exclude=["1"]) == ["2.weight"]


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.orthogonal, nn.utils.spectral_norm,
     lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
    ids=["weight_norm", "old_weight_norm", "orthogonal", "spectral_norm", "torch_prune"],
)  # fmt: skip
def test_a_computed_weight_is_refused_by_the_layers_name_and_can_be_excluded(wrap):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), wrap(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match=r"layer '1\.1' is computed"):
        names(model)
    assert names(model, exclude=["1.1"]) == ["0.weight"]
    assert names(model, include=["0"]) == ["0.weight"]


def test_subclasses_of_layers_count():
    class MyLinear(nn.Linear):
        pass

    assert names(nn.Sequential(MyLinear(3, 3))) == ["0.weight"]


def test_a_bare_layer():
    assert names(nn.Linear(3, 3)) == ["weight"]


def test_compiled_and_parallel_wrappers_give_the_same_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain = feather.prunable_parameters(model)
    for wrapped in (
        torch.compile(model, backend="eager"),
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(torch.compile(model, backend="eager")), backend="eager"),
    ):
        found = feather.prunable_parameters(wrapped)
        assert list(found) == list(plain)
        assert all(a is b for a, b in zip(found.values(), plain.values(), strict=True))
