"""Frameworks, the paper's word for where thresholds come from."""

from __future__ import annotations

from feather.frameworks.base import Framework
from feather.frameworks.global_magnitude import GlobalMagnitude

FRAMEWORKS: dict[str, type[Framework]] = {"global": GlobalMagnitude}

__all__ = ["FRAMEWORKS", "Framework", "GlobalMagnitude"]
