"""The networks have the paper's sizes and initialisations, and wrong names and files end in one sentence."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import create_model, list_models, load_weights
from models.pretrained import replace_classifier

# the paper's networks at 100 classes: parameters, prunable weights
COUNTS = {
    "resnet20": (1_096_196, 1_092_960),
    "mobilenet_v1": (3_315_428, 3_287_488),
    "densenet40_24": (714_196, 703_920),
}


def layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def counts(model):
    return sum(p.numel() for p in model.parameters()), sum(layer.weight.numel() for layer in layers(model))


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text and not text.rstrip(".").count(". ")


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_paper(name):
    assert counts(create_model(name, num_classes=100)) == COUNTS[name]


def test_resnet50_is_torchvisions():
    with torch.device("meta"):
        model = create_model("resnet50")
    assert counts(model) == (25_557_032, 25_502_912)
    assert type(model).__module__.startswith("torchvision")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("size", [16, 32])
def test_accepts_small_images(name, size):
    model = create_model(name, num_classes=10).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)


def assert_normal(weight, std):
    n = weight.numel()
    assert weight.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * n))
    assert abs(weight.mean().item()) < 6 * std / math.sqrt(n)
    # 0.6827 of a normal lies within one standard deviation, 0.577 of a uniform
    assert (weight.abs() < std).float().mean().item() == pytest.approx(0.6827, abs=3.5 / math.sqrt(n))


@pytest.mark.parametrize("name", ["resnet20", "densenet40_24"])
def test_convolutions_start_normal_by_fan_out(name):
    torch.manual_seed(0)
    convolutions = [layer for layer in layers(create_model(name, num_classes=100)) if isinstance(layer, nn.Conv2d)]
    assert all(conv.bias is None for conv in convolutions)
    for conv in convolutions:
        assert_normal(conv.weight.detach(), math.sqrt(2 / (conv.out_channels * math.prod(conv.kernel_size))))


def test_classifiers_start_as_published():
    torch.manual_seed(0)
    resnet, densenet = create_model("resnet20", num_classes=100).fc, create_model("densenet40_24", num_classes=100).fc
    assert_normal(resnet.weight.detach(), 0.01)
    bound = 1 / math.sqrt(densenet.in_features)
    assert densenet.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert densenet.weight.abs().max() <= bound
    assert not resnet.bias.any()
    assert not densenet.bias.any()


def test_mobilenet_starts_from_pytorchs_default():
    torch.manual_seed(0)
    model = create_model("mobilenet_v1", num_classes=100)
    for layer in layers(model):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert layer.weight.abs().max().item() <= bound * (1 + 1e-6)
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    with_bias = [name for name, module in model.named_modules() if getattr(module, "bias", None) is not None]
    assert all("pointwise" in name or "bn" in name or name == "fc" for name in with_bias)
    assert sum("pointwise" in name for name in with_bias) == 13


def test_mobilenet_strides():
    blocks = create_model("mobilenet_v1").blocks
    assert [i for i, block in enumerate(blocks, 1) if block.depthwise.stride == (2, 2)] == [2, 4, 6, 12]


def test_resnet20_order_of_execution_matches_the_authors():
    model, shapes = create_model("resnet20", num_classes=100).eval(), []
    for layer in layers(model):
        layer.register_forward_hook(lambda layer, *_: shapes.append(tuple(layer.weight.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    stage = lambda i, o: [(o, i, 3, 3), (o, o, 3, 3), (o, i, 1, 1), *[(o, o, 3, 3)] * 4]  # noqa: E731
    assert shapes == [(32, 3, 3, 3), *[(32, 32, 3, 3)] * 6, *stage(32, 64), *stage(64, 128), (100, 128)]


def test_width_scales_resnet20():
    assert create_model("resnet20", width=16).fc.in_features == 64


def test_every_source_is_listed_and_reached():
    names = list_models()
    assert names[:3] == list(COUNTS)
    assert len(names) == len(set(names))
    assert {"resnet50", "vit_b_16", "vit_tiny_patch16_224"} <= set(names)
    assert create_model("test_vit", num_classes=7)(torch.zeros(2, 3, 160, 160)).shape == (2, 7)  # timm's
    assert create_model("squeezenet1_1", num_classes=7)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)  # torchvision's


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_auxiliary_heads_are_off(name, size, pretrained, monkeypatch):
    import torchvision

    if pretrained:
        published = torchvision.models.get_model(name, init_weights=False).state_dict()
        monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: published)
    model = create_model(name, num_classes=3, pretrained=pretrained)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert not any("aux" in key.lower() for key in model.state_dict())


def test_import_is_lazy():
    code = (
        "import sys; from models import create_model; create_model('resnet20'); "
        "assert not {'torchvision', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "resnet_20"}, "resnet20"),
        ({"name": "zzzzqqqq"}, "mobilenet_v1"),
        ({"name": "resnet20", "widht": 16}, "widht"),
        ({"name": "resnet18", "widht": 16}, "widht"),
        ({"name": "test_vit", "widht": 16}, "widht"),
        ({"name": "resnet20", "num_classes": 0}, "num_classes=0"),
        ({"name": "resnet20", "pretrained": True}, "model.weights=PATH"),
        ({"name": "resnet18d", "pretrained": True, "widht": 16}, "widht"),
        ({"name": "test_vit.nonsense", "pretrained": True}, "pretrained=False"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(arguments, told):
    with pytest.raises(ValueError, match=told) as error:
        create_model(**arguments)
    assert one_sentence(error)


def test_failed_download_ends_in_one_sentence(monkeypatch):
    import urllib.error

    import torchvision

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match="resnet18 could not be fetched.*model.weights=PATH") as error:
        create_model("resnet18", pretrained=True)
    assert one_sentence(error)


def test_pretrained_torchvision_model_gets_a_new_classifier(monkeypatch):
    import torchvision

    published = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: published)
    model = create_model("resnet18", pretrained=True, num_classes=5)
    assert model.fc.out_features == 5
    assert torch.equal(model.conv1.weight, published["conv1.weight"])
    assert torch.equal(create_model("resnet18", pretrained=True).fc.weight, published["fc.weight"])


@pytest.mark.parametrize("name", ["vgg11", "vit_b_16", "squeezenet1_0", "mobilenet_v3_small", "swin_t", "densenet121"])
def test_replaced_classifier_has_the_shape_of_a_native_one(name):
    with torch.device("meta"):
        replaced, native = create_model(name), create_model(name, num_classes=7)
        replace_classifier(replaced, 7)
    assert {k: v.shape for k, v in replaced.state_dict().items()} == {
        k: v.shape for k, v in native.state_dict().items()
    }


@pytest.mark.parametrize("form", ["bare", "model", "state_dict", "module.", "_orig_mod.", "_orig_mod.module.", "safe"])
def test_load_weights_reads_every_form(form, tmp_path):
    source, target = (
        create_model("resnet20", num_classes=10, width=8),
        create_model("resnet20", num_classes=10, width=8),
    )
    content = state = source.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safe" else "w.pt")
    if form.endswith("."):
        content = {form + key: value for key, value in state.items()}
    elif form in ("model", "state_dict"):
        content = {form: state, "step": 3}
    save_file(state, path) if form == "safe" else torch.save(content, path)
    assert load_weights(target, path) == []
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


def test_load_weights_leaves_a_head_of_other_classes(tmp_path):
    source, target = create_model("resnet20", num_classes=10, width=8), create_model("resnet20", num_classes=3, width=8)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    head = target.fc.weight.clone()
    assert load_weights(target, tmp_path / "w.pt") == ["fc.weight", "fc.bias"]
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.conv1.weight, source.conv1.weight)


def damaged(kind, path):
    state = create_model("resnet20", num_classes=10, width=8).state_dict()
    if kind == "missing":
        del state["layer2.0.conv1.weight"]
    elif kind == "unexpected":
        state["extra.weight"] = torch.zeros(1)
    elif kind == "shape":
        state["layer2.0.conv1.weight"] = torch.zeros(16, 8, 5, 5)
    elif kind == "channels":
        state["conv1.weight"] = torch.zeros(9, 3, 3, 3)
    elif kind == "another model":
        state = create_model("resnet20", num_classes=10, width=4).state_dict()
    elif kind == "no state dict":
        state = {"step": 3}
    elif kind == "pickled object":
        state = {"model": nn.Linear(2, 2)}
    if kind == "garbage":
        path.write_bytes(b"no tensors here")
    elif kind != "absent":
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "layer2.0.conv1.weight is missing"),
        ("unexpected", "extra.weight is unexpected"),
        ("shape", "layer2.0.conv1.weight is of another shape"),
        ("channels", "conv1.weight is of another shape"),
        ("another model", "conv1.weight, bn1.weight, bn1.bias and .* more are of another shape"),
        ("no state dict", "holds no state dict"),
        ("pickled object", "no plain data"),
        ("garbage", "plain tensors"),
        ("absent", "does not exist"),
    ],
)
def test_load_weights_refuses_in_one_sentence_and_changes_nothing(kind, told, tmp_path):
    damaged(kind, tmp_path / "w.pt")
    model = create_model("resnet20", num_classes=10, width=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told) as error:
        load_weights(model, tmp_path / "w.pt")
    assert one_sentence(error)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_load_weights_names_a_broken_safetensors_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable safetensors file") as error:
        load_weights(create_model("resnet20", width=8), tmp_path / "w.safetensors")
    assert one_sentence(error)
