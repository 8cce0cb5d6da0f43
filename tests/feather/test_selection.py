"""Which weights are prunable."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import feather


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
