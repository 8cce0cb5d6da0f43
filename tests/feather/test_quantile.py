"""Exactness of the quantile, whichever way it is found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import feather
from feather import quantile

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
    expected = by_sorting(weights, sparsity)
    for algorithm in quantile.ALGORITHMS:
        ours = feather.magnitude_quantile(weights, sparsity, algorithm=algorithm)
        assert ours.dtype == expected.dtype
        assert ours.ndim == 0
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 101, 100_000])
@pytest.mark.parametrize("sparsity", RATIOS)
def test_quantile_equals_sorting_bit_for_bit(size, sparsity):
    assert_exact([normal(size)], sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.98])
def test_quantile_over_weights_larger_than_a_chunk_and_many_small_ones(sparsity):
    large = quantile._CHUNK + 12_345
    assert_exact(
        [normal(large), *(normal(7, 3, seed=i) for i in range(50)), normal(quantile._CHUNK, seed=99)], sparsity
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


@pytest.mark.parametrize("sparsity", [1e-9, 0.5, math.nextafter(1, 0)])
@pytest.mark.parametrize("values", [[0.25], [0.0], [0.0, 0.0, 0.0, 0.5], [1e-42, 0.25, math.inf]])
def test_few_different_magnitudes_in_large_weights(values, sparsity):
    size = quantile._CHUNK + 101
    assert_exact([torch.tensor(values).repeat(-(-size // len(values)))[:size]], sparsity)


def test_without_numpy_the_bits_are_the_same(monkeypatch):
    """torch does not need it."""
    monkeypatch.setattr(quantile, "numpy_reads_tensors", lambda: False)
    monkeypatch.setattr(quantile, "_by_partition", None)
    for size in (1, 2, 10_000):
        assert_exact([normal(size)], 0.9)


def test_nan_sorts_last_as_in_a_sort():
    weight = normal(1000)
    weight[::7] = math.nan
    for sparsity in (0.1, 0.5, 0.9):
        assert_exact([weight], sparsity)


@pytest.mark.parametrize("algorithm", ["sort", "counting"])
def test_what_other_devices_use_never_waits_for_them(algorithm):
    """A meta tensor has no values: reading one, or a shape that depends on them, raises."""
    weights = [torch.empty(1000, device="meta"), torch.empty(30, 40, device="meta")]
    threshold = feather.magnitude_quantile(weights, 0.9, algorithm=algorithm)
    assert threshold.device.type == "meta"
    assert threshold.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):  # so this test can fail: the CPU's way reads values
        quantile._by_partition([w.view(-1) for w in weights], torch.float32, (930, 931))


def test_the_weights_are_left_as_they_are():
    weights = [normal(1000), normal(10, 10)]
    before = [w.clone() for w in weights]
    for algorithm in quantile.ALGORITHMS:
        feather.magnitude_quantile(weights, 0.9, algorithm=algorithm)
    assert all(map(torch.equal, weights, before))


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm='histogram' is unknown: choose one of auto, sort, counting"):
        feather.magnitude_quantile([normal(10)], 0.5, algorithm="histogram")


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
