"""Frameworks, the paper's word for where thresholds come from."""

from __future__ import annotations

from feather.frameworks.base import Framework
from feather.frameworks.global_magnitude import GlobalMagnitude
from feather.frameworks.layerwise import ERK, Layerwise, Uniform

FRAMEWORKS: dict[str, type[Framework]] = {"global": GlobalMagnitude, "uniform": Uniform, "erk": ERK}

__all__ = ["ERK", "FRAMEWORKS", "Framework", "GlobalMagnitude", "Layerwise", "Uniform"]
