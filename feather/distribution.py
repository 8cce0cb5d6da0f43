"""Layer-wise allocations of sparsity, as pure functions of the weights' shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Distribution = Callable[[Sequence[Sequence[int]], float], list[float]]


def uniform(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """The same sparsity in every layer.

    Args:
        shapes: of the prunable weights.
        sparsity: of all of them together, in [0, 1).

    Returns:
        One sparsity per layer.
    """
    return [sparsity] * len(shapes)


def erdos_renyi_kernel(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """ERK: a layer's density is proportional to the sum of its dimensions over their product.

    RigL, https://arxiv.org/abs/1911.11134, section 3 (1): ``1 - s_l = eps * sum(shape_l) / prod(shape_l)``. Layers that
    would get a density above 1 stay dense, and the others share what is left, so that the whole has ``sparsity``.

    Args:
        shapes: of the prunable weights, (outputs, inputs, *kernel).
        sparsity: of all of them together, in [0, 1).

    Returns:
        One sparsity per layer, in [0, 1).
    """
    sizes = [math.prod(shape) for shape in shapes]
    nonzeros = (1 - sparsity) * sum(sizes)
    dense: set[int] = set()
    while len(dense) < len(shapes):
        sparse = [i for i in range(len(shapes)) if i not in dense]
        budget = nonzeros - sum(sizes[i] for i in dense)
        eps = budget / sum(sum(shapes[i]) for i in sparse)
        full = {i for i in sparse if eps * sum(shapes[i]) >= sizes[i]}
        if not full:
            return [0.0 if i in dense else 1 - eps * sum(shapes[i]) / sizes[i] for i in range(len(shapes))]
        dense |= full
    return [0.0] * len(shapes)
