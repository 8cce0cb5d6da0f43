"""Frameworks, the paper's word for where thresholds come from."""

from __future__ import annotations

from feather.frameworks.asl import ASL
from feather.frameworks.asl_plus import ASLPlus
from feather.frameworks.base import Framework
from feather.frameworks.global_magnitude import GlobalMagnitude
from feather.frameworks.layerwise import ERK, Layerwise, Uniform

BY_MAGNITUDE: dict[str, type[Framework]] = {"global": GlobalMagnitude, "uniform": Uniform, "erk": ERK}
FRAMEWORKS: dict[str, type[Framework]] = {**BY_MAGNITUDE, "asl": ASL, "asl_plus": ASLPlus}

__all__ = [
    "ASL", "BY_MAGNITUDE", "ERK", "FRAMEWORKS", "ASLPlus", "Framework", "GlobalMagnitude", "Layerwise", "Uniform",
]  # fmt: skip
