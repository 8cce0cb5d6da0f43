"""Random number generators: seeding, and a state that a checkpoint can hold."""

import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices).

    Raises:
        ValueError: ``seed`` is outside [0, 2**32), which is what NumPy accepts.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be in [0, {2**32 - 1}]")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party augmentation draws from the global generator
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process, made of tensors, numbers, strings, lists and tuples only.

    Of several GPUs it holds the current device's, which this process draws on; of several processes each has its own.
    """
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy_state,
            "state": {
                # torch.load(weights_only=True) takes no NumPy arrays, and torch has few operations on uint32.
                "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
                "pos": int(numpy_state["state"]["pos"]),
            },
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` returned; a GPU's state is left out where either side has no GPU."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            **numpy_state,
            "state": {
                "key": numpy_state["state"]["key"].cpu().numpy().astype(np.uint32),
                "pos": numpy_state["state"]["pos"],
            },
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def set_deterministic(enabled: bool) -> None:
    """Same numbers in every run on the same machine (slower), or the fastest kernels.

    Call it before the first CUDA operation: cuBLAS reads its setting once.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.deterministic = enabled
    torch.backends.cudnn.benchmark = not enabled
