"""Tensors that lie behind each other in memory."""

import pytest
import torch

from feather.flat import flatten, joined, pack, runs


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (4, 5, 3, 3), (), (7, 2), (6, 1, 3, 3), (0, 4), (6, 5, 1, 1), (1, 1, 1)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    made[3] = made[3].T
    made[6] = made[6].contiguous(memory_format=torch.channels_last)  # whose strides are those of many tensors
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_copies_have_values_shapes_and_layouts_and_are_one_again(dtype):
    before = tensors(dtype)
    packed = pack(before)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(packed, before, strict=True))
    whole = joined(packed)
    assert torch.equal(whole, torch.cat([flatten(t) for t in before]))
    whole.zero_()
    assert all((t == 0).all() for t in packed), "joined is a view"
    assert any((t != 0).any() for t in before), "pack copies"


def test_channels_last_is_flattened_in_place():
    weight = torch.randn(16, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    assert flatten(weight).data_ptr() == weight.data_ptr()


def test_gaps_are_left_out_of_the_copies():
    with_gaps = torch.arange(24.0).view(4, 6)[:, ::2]
    assert joined([with_gaps]) is None
    (packed,) = pack([with_gaps])
    assert torch.equal(packed, with_gaps)
    assert torch.equal(joined([packed]), with_gaps.flatten())


def test_tensors_of_several_types_are_packed_type_by_type():
    single, double = tensors(torch.float32), tensors(torch.float64)
    mixed = [t for pair in zip(single, double, strict=True) for t in pair]
    packed = pack(mixed)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(packed, mixed, strict=True))
    assert joined(packed) is None
    assert joined(packed[::2]) is not None
    assert joined(packed[1::2]) is not None


def test_what_does_not_lie_behind_each_other_is_not_joined():
    packed = pack(tensors())
    assert joined(tensors()) is None
    assert joined([packed[1], packed[0]]) is None
    assert joined([packed[0], packed[3]]) is None
    assert torch.equal(joined(packed[1:2]), flatten(packed[1]))


def test_runs_end_at_their_length_at_zeros_and_where_a_large_tensor_begins():
    one, two, zero = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.0)
    sizes_and_values = [(3, one), (4, one), (25, two), (6, zero), (2, one), (5, two), (4, one)]
    found = runs([torch.empty(size) for size, _ in sizes_and_values], [value for _, value in sizes_and_values], 10)
    told = [[(int(value), size) for value, size in run] for run in found]
    assert told == [[(1, 7)], [(2, 10)], [(2, 10)], [(2, 5)], [(0, 6)], [(1, 2), (2, 5)], [(1, 4)]]
