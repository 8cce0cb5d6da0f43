"""P_T and the gradient rule against their literal forms."""

import math

import pytest
import torch

import feather
from feather import operator
from feather.flat import pack

ORDERS = [1, 1.5, 2, 2.5, 3, 5, 15, math.inf]


def literal(weight, threshold, p):
    """The paper's equation in float64, on the values that the operator sees."""
    w, t = weight.double(), threshold.double()
    inside = w if math.isinf(p) else w.sign() * (w.abs() ** p - t**p).clamp(min=0) ** (1 / p)
    return torch.where(w.abs() > t, inside, 0.0)


def right_above(threshold, count=2000):
    """The ``count`` floats that follow T, with both signs."""
    bits = torch.arange(1, count + 1) + threshold.view(torch.int32)
    above = bits.to(torch.int32).view(torch.float32)
    return torch.cat([above, -above])


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_equals_the_literal_form_in_float64(p, scale):
    weight = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    threshold = torch.tensor(0.7 * scale, dtype=torch.float64)
    sparse = feather.p_threshold(weight, threshold, p)
    expected = literal(weight, threshold, p)
    assert torch.equal(sparse == 0, weight.abs() <= threshold)
    away = weight.abs() > 1.001 * threshold  # the literal form cancels right above T
    torch.testing.assert_close(sparse[away], expected[away], rtol=1e-11, atol=0)
    torch.testing.assert_close(sparse, expected, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("value", [3e-3, 0.05, 0.7])
def test_fp32_keeps_its_precision_right_above_the_threshold(p, value):
    threshold = torch.tensor(value)
    weight = torch.cat([right_above(threshold), torch.linspace(value, 100 * value, 5000)[1:]])
    sparse = feather.p_threshold(weight, threshold, p).double()
    a, t = weight.double().abs(), threshold.double()
    gap = (a - t) / a  # exact enough in float64: no cancellation is left
    expected = a if math.isinf(p) else a * (-torch.expm1(p * torch.log1p(-gap))) ** (1 / p)
    assert ((sparse.abs() - expected) / expected).abs().max() < 5e-7
    assert torch.equal(sparse.sign(), weight.double().sign())


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_fp32(p, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(4000, generator=generator) * 1e-3).to(dtype)  # |w|^3 underflows in fp16
    threshold = torch.tensor(5e-4)
    sparse = feather.p_threshold(weight, threshold, p)
    assert sparse.dtype == dtype
    expected = feather.p_threshold(weight.double(), threshold.double(), p)
    torch.testing.assert_close(sparse.double(), expected, rtol=torch.finfo(dtype).eps, atol=6e-8)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kept_weight_never_rounds_to_zero(p, dtype):
    """A threshold just below a half-precision weight would otherwise prune it by underflow."""
    weight = torch.tensor([0.01, -0.01], dtype=dtype)
    threshold = torch.nextafter(weight[0].float(), torch.tensor(0.0))
    sparse = feather.p_threshold(weight, threshold, p)
    assert torch.equal(sparse.sign(), weight.sign())


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_threshold_is_the_identity_bit_for_bit(p, dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    special = [0.0, -0.0, smallest, -smallest, info.smallest_normal, info.max, -info.max, 1.0, -1 / 3, math.inf]
    weight = torch.tensor([*special, math.nan], dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    sparse = feather.p_threshold(weight, torch.tensor(0.0), p)
    assert torch.equal(sparse.view(integer), weight.view(integer))


@pytest.mark.parametrize("p", ORDERS)
def test_nan_propagates_and_a_weight_equal_to_the_threshold_is_pruned(p):
    threshold = torch.tensor(0.25)
    above = torch.nextafter(threshold, torch.tensor(1.0))
    weight = torch.stack([torch.tensor(math.nan), threshold, -threshold, above, -above])
    sparse = feather.p_threshold(weight, threshold, p)
    assert sparse[0].isnan()
    assert (sparse[1:3] == 0).all()
    assert sparse[3] > 0 > sparse[4]


@pytest.mark.parametrize("p", ORDERS)
def test_fp64_threshold_between_fp32_weights_is_not_rounded_up_to_the_upper_one(p):
    upper = torch.tensor(0.3)
    threshold = torch.nextafter(upper.double(), torch.tensor(0.0, dtype=torch.float64))
    assert feather.p_threshold(upper.reshape(1), threshold, p).item() != 0


@pytest.mark.parametrize("size", [10, 100_000])
def test_no_gradient_flows_through_the_operator(size):
    weight = torch.randn(size, requires_grad=True)
    assert not feather.p_threshold(weight, torch.tensor(0.5)).requires_grad


def test_layout_of_the_weight_is_kept_and_the_weight_is_not_written():
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    before = weight.clone()
    sparse = feather.p_threshold(weight, torch.tensor(0.5))
    assert sparse.stride() == weight.stride()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.5, 1.0])
def test_gradient_rule(theta):
    sparse = torch.tensor([0.0, -0.0, 1e-30, -2.0, 1.0])
    grad = torch.tensor([2.0, -4.0, 3.0, -5.0, -math.inf])
    expected = torch.tensor([2.0 * theta, -4.0 * theta, 3.0, -5.0, -math.inf])
    assert torch.equal(feather.scale_pruned_gradient(grad, sparse, theta), expected)
    assert (
        feather.scale_pruned_gradient(torch.full((3,), math.nan), torch.tensor([0.0, 1.0, math.nan]), theta)
        .isnan()
        .all()
    )


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (8, 4, 3, 3), (8, 1, 3, 3), (8, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_rule_keeps_the_strides_of_the_gradient(shape, channels_last):
    """DistributedDataParallel and the accumulation into .grad compare them, those of single elements included."""
    layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
    grad, sparse = (torch.empty(shape, memory_format=layout).normal_() for _ in range(2))
    assert feather.scale_pruned_gradient(grad, sparse, 0.5).stride() == grad.stride()


def test_gradient_rule_can_be_differentiated():
    grad = torch.tensor([3.0, 2.0], requires_grad=True)
    scaled = feather.scale_pruned_gradient(grad, torch.tensor([0.0, -1.0]), 0.25)
    assert torch.autograd.grad(scaled.square().sum(), grad)[0].tolist() == [0.25**2 * 2 * 3, 4.0]


def test_gradient_rule_of_an_expanded_gradient():
    grad = torch.ones(1, 3).expand(4, 3)
    sparse = torch.tensor([[0.0, 1.0, 0.0]]).repeat(4, 1)
    assert feather.scale_pruned_gradient(grad, sparse, 0.5).tolist() == [[0.5, 1.0, 0.5]] * 4


def test_theta_rule_is_strict_at_95_percent():
    assert feather.auto_theta(0.95) == 1.0
    assert feather.auto_theta(math.nextafter(0.95, 1)) == 0.5
    assert feather.auto_theta(0.0) == 1.0
    assert feather.auto_theta(0.99) == 0.5


LAYOUTS = ["contiguous", "channels_last", "transposed", "slice", "gaps"]


def in_layout(layout, weight):
    return {
        "contiguous": weight,
        "channels_last": weight.contiguous(memory_format=torch.channels_last),
        "transposed": weight.transpose(0, 3),
        "slice": weight[3:9],
        "gaps": weight[..., ::2],
    }[layout]


@pytest.mark.parametrize("p", [1.5, 3, 15])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("few", [0.0, 1.1])
def test_the_kept_weights_are_the_same_in_every_layout_be_they_few_or_many(p, layout, few, monkeypatch):
    """Where few are kept the root is taken of them alone."""
    monkeypatch.setattr(operator, "_FEW", few)
    weight = in_layout(layout, torch.randn(24, 16, 3, 6, generator=torch.Generator().manual_seed(3)))
    kept = weight.abs() > 2.2
    assert 0 < kept.sum() < 0.05 * kept.numel()
    sparse = feather.p_threshold(weight, torch.tensor(2.2), p)
    assert torch.equal(sparse != 0, kept)
    torch.testing.assert_close(sparse.double(), literal(weight, torch.tensor(2.2), p), rtol=2e-5, atol=0)
    assert sparse.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("few", [0.0, 1.1])
def test_a_nan_is_kept_be_the_kept_few_or_many(few, monkeypatch):
    monkeypatch.setattr(operator, "_FEW", few)
    weight = torch.full((100,), 0.1)
    weight[7] = math.nan
    sparse = feather.p_threshold(weight, torch.tensor(0.5))
    assert sparse.isnan().nonzero().tolist() == [[7]]
    assert sparse.count_nonzero() == 1


@pytest.mark.parametrize("p", [1, 3, 4, math.inf])
@pytest.mark.parametrize("values", [[0.0], [0.3], [2.0], [0.0, 0.3, 0.3, 0.0, 2.0], [2.0, 1.9, 1.8, 0.1, 0.0]])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("most", [100, 2000, 10**6])
def test_weights_together_are_thresholded_as_each_alone(most, packed, values, p, monkeypatch):
    monkeypatch.setattr(operator, "_SLICE", most)
    generator = torch.Generator().manual_seed(0)
    weights = [in_layout(layout, torch.randn(24, 16, 3, 6, generator=generator)) for layout in LAYOUTS]
    weights[1][0, 0] = -0.0
    weights = pack(weights) if packed else weights
    made = [torch.tensor(value) for value in values]
    thresholds = made * len(weights) if len(made) == 1 else made
    before = [weight.clone() for weight in weights]
    together = operator.p_threshold_all(weights, thresholds, p)
    for weight, threshold, sparse, untouched in zip(weights, thresholds, together, before, strict=True):
        alone = feather.p_threshold(weight, threshold, p)
        torch.testing.assert_close(sparse, alone, rtol=3e-7, atol=0)
        assert torch.equal(sparse == 0, alone == 0)
        assert torch.equal(sparse.signbit(), alone.signbit())
        assert sparse.stride() == alone.stride()
        assert torch.equal(weight, untouched)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("p", [1, 2.5, 3, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 4099])
def test_slices_of_a_large_weight_are_computed_as_the_whole(size, dtype, p, kept, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, generator=generator).to(dtype)
    weight[:: max(size // 5, 1)] = 0.0
    threshold = weight.float().abs().quantile(1 - kept).clamp(min=1e-3)
    whole = operator._of_order(p, weight, threshold.to(torch.promote_types(dtype, torch.float32)))
    monkeypatch.setattr(operator, "_SLICE", 509)
    sliced = feather.p_threshold(weight, threshold, p)
    # a vector unit and a scalar one may round a root differently
    torch.testing.assert_close(sliced, whole, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(sliced == 0, weight.abs() <= threshold)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("size", [3, 100_000])
def test_zeros_have_no_sign(p, size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    sparse = feather.p_threshold(weight, torch.tensor(1.0), p)
    assert (sparse == 0).any()
    assert not sparse[sparse == 0].signbit().any()


@pytest.mark.parametrize("p", ORDERS)
def test_a_device_is_never_waited_for(p):
    """A meta tensor has no values: reading one raises."""
    weight = torch.empty(64, 64, device="meta")
    assert feather.p_threshold(weight, torch.empty((), device="meta"), p).shape == weight.shape


@pytest.mark.parametrize("p", [1, 2, 3, 5, math.inf])
def test_denormal_and_extreme_weights_keep_the_equation(p):
    """Of a kept denormal weight the result may round to zero, as the equation's own value does."""
    weight = torch.tensor([1e-42, -3e-42, 1e-45, 3e38, -3e38, 0.0, -0.0])
    for threshold in (1e-42, 1e-20, 1e38):
        sparse = feather.p_threshold(weight, torch.tensor(threshold), p)
        expected = literal(weight, torch.tensor(threshold), p)
        assert sparse.isfinite().all()
        assert (sparse[weight.abs() <= torch.tensor(threshold)] == 0).all()
        torch.testing.assert_close(sparse.double(), expected, rtol=1e-5, atol=2e-45)
