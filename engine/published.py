"""Published top-1 accuracies, each with where it was read: the only place that holds a figure which is not ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.results import Setting


@dataclass(frozen=True)
class Figure:
    """One published accuracy.

    Attributes:
        dataset, model, method, modifier: our names; a method that we lack keeps its own.
        sparsity: fraction of zeros of its column, such as 0.8.
        top1: in percent.
        source: where it was read.
        reported_sparsity: the fraction that the source gives, where it is not that of its column.
        flops: multiply-accumulates per image, where the source gives them.
        variant: what sets it apart from the method as we run it; such a figure is shown but not subtracted.
    """

    dataset: str
    model: str
    method: str
    sparsity: float
    top1: float
    source: str
    modifier: str = "none"
    reported_sparsity: float | None = None
    flops: float | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """Method, modifier and variant in words."""
        method = self.method if self.modifier == "none" else f"{self.method} + {self.modifier}"
        return f"{method}, {self.variant}" if self.variant else method


_BOARD = "paperswithcode board of the paper"
_COLUMNS = (0.8, 0.9, 0.95, 0.98, 0.99)
_Row = tuple[float | None, ...]


def _row(method: str, top1: _Row, source: str, **extra: object) -> Iterator[Figure]:
    """Figures of one line of a table; a tuple in ``extra`` holds one value per column."""
    for i, (sparsity, value) in enumerate(zip(_COLUMNS, top1, strict=True)):
        if value is not None:
            own = {key: v[i] if isinstance(v, tuple) else v for key, v in extra.items()}
            yield Figure("imagenet", "resnet50", method, sparsity, value, source, **own)  # type: ignore[arg-type]


_ST3 = "README of the ST-3 code"
_STR = "README of the STR code"
_RIGL = "README of the RigL code"

FIGURES: tuple[Figure, ...] = (
    Figure("imagenet", "resnet50", "dense", 0.0, 77.10, _ST3, flops=4089e6),
    Figure("imagenet", "resnet50", "dense", 0.0, 77.0, _STR),
    *_row("feather", (None, 76.93, None, None, None), _BOARD),
    *_row("spartan", (None, 76.17, None, None, None), "paperswithcode board"),
    *_row("st3", (76.95, 76.03, 74.46, 70.46, 63.88), _ST3, flops=(1215e6, 764e6, 436e6, 220e6, 120e6)),
    *_row("st3_sigma", (76.44, 75.28, 73.69, 69.75, 63.25), _ST3, flops=(739e6, 397e6, 219e6, 116e6, 69e6)),
    *_row(
        "str",
        (76.12, 74.31, 70.23, 61.46, 51.82),
        _STR,
        reported_sparsity=(0.8127, 0.9023, 0.9515, 0.9805, 0.9898),
    ),
    *_row("rigl", (75.12, 73.07, None, None, None), _RIGL),
    *_row("rigl", (77.17, 76.42, 74.63, None, 61.86), _RIGL, variant="5 times the training"),
    *_row("acdc", (76.45, 75.03, 73.14, 68.48, None), "README of the AC/DC code"),
    *_row("optg", (None, 74.55, 72.45, 67.20, 62.10), "README of the OptG code"),
    *_row("acdc", (77.20, 76.66, 75.45, None, None), "README of the HAM code", modifier="ham"),
)

_HYPERSPARSE = "README of the HyperSparse code"
NEIGHBOURS: tuple[Figure, ...] = tuple(
    Figure("cifar100", "resnet32", "dense" if sparsity == 0 else "hypersparse", sparsity, top1, _HYPERSPARSE)
    for sparsity, top1 in ((0.0, 74.60), (0.9, 74.08), (0.98, 70.08), (0.995, 59.58))
)
"""Another network than any of ours (ResNet-32 of ResNet-20's widths): never subtracted from our figures."""

# The paper has figures for these, which could not be read.
_UNKNOWN = {("cifar100", model) for model in ("resnet20", "mobilenet_v1", "densenet40_24")}


def exists(dataset: str, model: str) -> str:
    """ "known", "unknown" (there are published figures that could not be read) or "none"."""
    if any((f.dataset, f.model) == (dataset, model) for f in FIGURES):
        return "known"
    return "unknown" if (dataset, model) in _UNKNOWN else "none"


def figures_for(dataset: str, model: str) -> list[Figure]:
    return [f for f in FIGURES if (f.dataset, f.model) == (dataset, model)]


def neighbours_of(dataset: str) -> list[Figure]:
    """Figures of other networks on the same data, for orientation alone."""
    return [f for f in NEIGHBOURS if f.dataset == dataset]


def comparable(setting: Setting) -> bool:
    """Whether a run is of full length, and in the form that its method's paper gives it."""
    if setting.scale != "full" or setting.label.startswith("shortened"):
        return False
    if setting.method == "feather":  # where its thresholds come from is not said beside its figure
        return (setting.p, setting.theta) == ("3", "auto")
    from feather import default_framework

    return setting.framework in ("", default_framework(setting.method))


def beside(setting: Setting, sparsity: float) -> list[Figure]:
    """The published figures that a run of ``setting`` at ``sparsity`` can be compared with."""
    if not comparable(setting):
        return []
    modifier = setting.modifier or "none"
    own = (setting.method, modifier, sparsity)
    found = figures_for(setting.dataset, setting.model)
    return [f for f in found if (f.method, f.modifier, f.sparsity) == own and not f.variant]
