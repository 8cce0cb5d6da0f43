"""Trained sparse networks as C without a runtime, and as small files (needs numpy besides torch)."""

from feather.deploy.compiler import Compiled, compile_model, generate
from feather.deploy.errors import DeployError
from feather.deploy.runtime import Model, load
from feather.deploy.sparse_file import load as load_weights
from feather.deploy.sparse_file import save as save_weights

__all__ = [
    "Compiled", "DeployError", "Model", "compile_model", "generate", "load", "load_weights", "save_weights",
]  # fmt: skip
