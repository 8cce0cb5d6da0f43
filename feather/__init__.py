"""Sparse training for any torch model in two lines: Feather (https://arxiv.org/abs/2310.02448) and its relatives."""

from feather.frameworks import FRAMEWORKS
from feather.modifiers import HAM, MODIFIERS, Modifier
from feather.operator import auto_theta, p_threshold, scale_pruned_gradient
from feather.quantile import magnitude_quantile, zeros_at
from feather.registry import create, default_framework, fine_tune, methods
from feather.report import FlopsReport, SparsityReport, count_flops, sparsity_report
from feather.schedule import Cubic, Linear, OneShot, Schedule
from feather.selection import prunable_parameters
from feather.sparsifier import Sparsifier

__version__ = "0.1.0"

__all__ = [
    "FRAMEWORKS", "HAM", "MODIFIERS", "Cubic", "FlopsReport", "Linear", "Modifier", "OneShot", "Schedule", "Sparsifier",
    "SparsityReport", "auto_theta", "count_flops", "create", "default_framework", "fine_tune", "magnitude_quantile",
    "methods", "p_threshold", "prunable_parameters", "scale_pruned_gradient", "sparsity_report", "zeros_at",
]  # fmt: skip
