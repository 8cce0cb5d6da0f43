"""`create_model`: one name space over this package, torchvision and timm, searched in this order.

torchvision and timm are imported only when a name needs them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from models.densenet_cifar import DenseNet40
from models.mobilenet_v1 import MobileNetV1
from models.pretrained import replace_classifier
from models.resnet_cifar import ResNet20

OURS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNet20,
    "mobilenet_v1": MobileNetV1,
    "densenet40_24": DenseNet40,
}


def list_models() -> list[str]:
    """Every name `create_model` accepts: ours, then torchvision's classifiers, then timm's."""
    import timm

    names = [*OURS, *_torchvision_names(), *timm.list_models()]
    return list(dict.fromkeys(names))


def create_model(name: str, *, num_classes: int = 1000, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a network that maps `(batch, 3, height, width)` images to `(batch, num_classes)` logits.

    Args:
        name: `resnet20`, `mobilenet_v1`, `densenet40_24`, or any classification model of torchvision or timm
            (`resnet50` is torchvision's).
        num_classes: outputs of the classifier.
        pretrained: start from the weights that torchvision or timm publish for the name; the classifier is drawn
            anew when `num_classes` differs from theirs.
        **options: further arguments of the network's constructor, such as `width` of `resnet20`.

    Raises:
        ValueError: unknown name or option, or `pretrained` for a network without published weights.
        OSError: the published weights could not be fetched.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least one class")
    if name in OURS:
        if pretrained:
            raise ValueError(f"{name} has no published weights: give your own with model.weights=PATH")
        build = OURS[name]
        return _build(name, lambda: build(num_classes=num_classes, **options))
    if name in _torchvision_names():
        return _build_torchvision(name, num_classes, pretrained, options)

    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"use {', '.join(OURS)}, or a torchvision or timm name"
        raise ValueError(f"Unknown model {name!r}: {hint}")
    if pretrained and not timm.models.is_model_pretrained(name):
        raise ValueError(f"{name} has no published weights in timm: use pretrained=False")
    return _build(
        name,
        lambda: timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options),
        fetches=pretrained,
    )


def _torchvision_names() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _build_torchvision(name: str, num_classes: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import torchvision

    get_model = torchvision.models.get_model
    if pretrained:
        model = _build(name, lambda: get_model(name, weights="DEFAULT", **options), fetches=True)
    else:
        if name in ("googlenet", "inception_v3"):
            options = {"init_weights": True, **options}  # the default, which warns unless it is spelt out
        model = _build(name, lambda: get_model(name, num_classes=num_classes, **options))
    if getattr(model, "aux_logits", False):  # GoogLeNet's and Inception's, which return a tuple in training mode
        for attribute, value in (("aux_logits", False), ("aux1", None), ("aux2", None), ("AuxLogits", None)):
            setattr(model, attribute, value)
    replace_classifier(model, num_classes)
    return model


def _build(name: str, build: Callable[[], nn.Module], fetches: bool = False) -> nn.Module:
    """Run a constructor; turn an unknown option or a failed download into one sentence."""
    try:
        return build()
    except TypeError as error:
        option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if option is None:
            raise
        raise ValueError(f"Model {name} has no option {option[1]!r}: remove it or check its spelling") from error
    except Exception as error:
        # urllib, http clients of huggingface_hub and checksum failures share no narrower base class
        wrong_option = isinstance(error, ValueError) and not isinstance(error, OSError)
        if not fetches or wrong_option:
            raise
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise OSError(
            f"The pretrained weights of {name} could not be fetched ({reason}): "
            "connect to the network, or give a local file with model.weights=PATH"
        ) from error
