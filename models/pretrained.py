"""Dense pretrained weights from a file, as a start for fine-tuning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.plain import PlainFileError, load_plain

PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Load a state dict into `model`, in place.

    Args:
        model: the network, with the classifier it is to be trained with.
        path: a `.safetensors` file, or a `.pt`/`.pth` file that holds a state dict, bare or under the key `model` or
            `state_dict`. Prefixes left by DistributedDataParallel and torch.compile are removed.

    Returns:
        The names left at their initialisation: those of a classifier whose number of classes differs, else none.

    Raises:
        ValueError: the file cannot be read, or differs from the network in anything but the number of classes; the
            network is then unchanged.
    """
    path = Path(path)
    own = model.state_dict()
    found = {_strip(name, own): value for name, value in _read(path).items()}

    wrong = [name for name in found if name in own and found[name].shape != own[name].shape]
    head = wrong if _differ_in_classes_only(model, own, found, wrong) else []
    problems = {
        "missing": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in found if name not in own],
        "of another shape": [] if head else wrong,
    }
    told = [f"{_some(names)} {'is' if len(names) == 1 else 'are'} {kind}" for kind, names in problems.items() if names]
    if told:
        raise ValueError(f"{path} does not fit the model: {'; '.join(told)}")

    model.load_state_dict({name: value for name, value in found.items() if name not in head}, strict=False)
    return head


def find_classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the last Linear or Conv2d in order of definition: the classifier of every usual network."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d layer that could be its classifier")
    return layers[-1]


def replace_classifier(model: nn.Module, num_classes: int) -> None:
    """Give `model` a freshly drawn classifier of `num_classes` outputs, unless it has as many already."""
    name, old = find_classifier(model)
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Linear):
        if old.out_features == num_classes:
            return
        new = nn.Linear(old.in_features, num_classes, bias)
    else:
        if old.out_channels == num_classes:
            return
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, bias=bias)  # type: ignore[arg-type]
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a .safetensors, .pt or .pth file")
    content: Any
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    else:
        try:
            content = load_plain(path)
        except PlainFileError as error:
            raise ValueError(f"{error}: save it with torch.save(model.state_dict(), PATH)") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no state dict: expected names and tensors, bare or under 'model' or 'state_dict'"
        )
    return content


def _strip(name: str, own: dict[str, Tensor]) -> str:
    while name not in own and name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _differ_in_classes_only(
    model: nn.Module, own: dict[str, Tensor], found: dict[str, Tensor], names: list[str]
) -> bool:
    """Whether the mismatched tensors are those of the classifier and differ in their first dimension alone."""
    if not names:
        return False
    num_classes = find_classifier(model)[1].weight.shape[0]
    theirs = {found[name].shape[:1] for name in names}
    return len(theirs) == 1 and all(
        own[name].shape[:1] == (num_classes,) and own[name].shape[1:] == found[name].shape[1:] for name in names
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
