"""What the command line may call a model: a run directory, weights with a network's name, or an exported program."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import feather
from feather.deploy import sparse_file
from feather.deploy.emit import Normalization
from feather.deploy.errors import DeployError
from feather.deploy.graph import Shape

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Subject:
    """A network, the shape of one input, and the mean and deviation of its data where these are known."""

    model: nn.Module | ExportedProgram
    input_shape: Shape
    name: str
    normalization: Normalization | None = None


def open_model(
    path: Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    shape: Shape | None = None,
    options: dict[str, Any] | None = None,
) -> Subject:
    """Open what the user named.

    Args:
        path: a run directory of ``train.py``; weights (``.safetensors``, ``.pt``, or what ``feather export`` wrote) of
            a network of this project; or a ``.pt2`` file of ``torch.export.save``.
        model, num_classes, shape, options: what the file alone does not say; they go before what a run says.

    Raises:
        DeployError: the file is missing, damaged or of another kind, or more must be said.
    """
    if not path.exists():
        raise DeployError(
            f"{path} does not exist: give a run directory, a file of weights, or an exported .pt2 program"
        )
    if path.suffix == ".pt2":
        return _open_program(path)
    normalization = None
    settings = dict(options or {})
    if path.is_dir():
        run = _read_run(path)
        normalization = run.normalization
        model, shape = model or run.model, shape or run.shape
        num_classes = num_classes or run.num_classes
        settings = {**run.options, **settings}
        path = path / WEIGHTS
        if not path.exists():
            raise DeployError(f"{path} does not exist: finish the run first")
    if model is None or num_classes is None or shape is None:
        raise DeployError(f"{path} alone does not say what it is: add --model, --num-classes and --shape")
    network = _laboratory("models").create_model
    try:
        built: nn.Module = network(model, num_classes=num_classes, **settings)
    except ValueError as error:
        raise DeployError(str(error)) from error
    _load_weights(built, path)
    return Subject(built.eval(), shape, model, normalization)


@dataclass(frozen=True)
class _Run:
    model: str
    options: dict[str, Any]
    num_classes: int | None
    shape: Shape | None
    normalization: Normalization | None


def _laboratory(name: str) -> Any:
    try:
        with _checkout():
            return importlib.import_module(name)
    except ImportError:
        raise DeployError(
            f"The package {name!r} is needed to build the network: run this in the repository with its [lab] packages, "
            "or give a program written by torch.export.save (.pt2)"
        ) from None


@contextmanager
def _checkout() -> Iterator[None]:
    """Lets the networks of the repository be imported: they are no part of the installed library.

    A console script, unlike ``python -m``, does not search the current directory.
    """
    before = sys.path[:]
    sys.path += [str(root) for root in (Path(feather.__file__).parents[1], Path.cwd()) if (root / "models").is_dir()]
    try:
        yield
    finally:
        sys.path[:] = before


def _read_run(directory: Path) -> _Run:
    yaml = _laboratory("yaml")

    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
        model, dataset = config["model"], config["dataset"]
        name, options, data = str(model["name"]), dict(model.get("options") or {}), str(dataset["name"])
        size = dataset.get("image_size")
    except OSError as error:
        raise DeployError(f"{error.filename} cannot be read ({error.strerror}): give a run directory") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise DeployError(f"The config.yaml of {directory} is damaged: name the weights and --model instead") from None
    small = _laboratory("engine.data.small").RECIPES
    if data in small:
        recipe = small[data]
        channels, height, width = recipe.image_shape
        shape = (channels, size or height, size or width)
        return _Run(name, options, recipe.num_classes, shape, (tuple(recipe.mean), tuple(recipe.std)))
    statistics = _laboratory("engine.data.imagenet")
    side = size or 224
    # The number of classes of a folder of images is known to its folder alone.
    return _Run(name, options, None, (3, side, side), (tuple(statistics.MEAN), tuple(statistics.STD)))


def _load_weights(model: nn.Module, path: Path) -> None:
    if path.suffix == ".feather":
        try:
            model.load_state_dict(sparse_file.load(path))
        except RuntimeError as error:
            raise DeployError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()[:200]}") from None
        return
    try:
        head = _laboratory("models").load_weights(model, path)
    except ValueError as error:
        raise DeployError(str(error)) from error
    if head:
        raise DeployError(f"{path} has another number of classes: say how many with --num-classes")


def _open_program(path: Path) -> Subject:
    try:
        program = torch.export.load(path)
    except Exception as error:  # zip, pickle and schema errors share no class
        raise DeployError(f"{path} is no readable file of torch.export.save ({type(error).__name__})") from error
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in inputs if node.name in names]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor):
        raise DeployError(f"{path} has {len(values)} inputs: expected one tensor")
    return Subject(program, tuple(int(size) for size in values[0].shape[1:]), path.stem)
