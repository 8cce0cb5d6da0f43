"""Changes of the optimizer's step that combine with any method: one paper, one file, its link on the first line."""

from __future__ import annotations

from feather.modifiers.base import Modifier
from feather.modifiers.ham import HAM

MODIFIERS: dict[str, type[Modifier]] = {"ham": HAM}

__all__ = ["HAM", "MODIFIERS", "Modifier"]
