"""int8 weights: each output channel's largest magnitude becomes 127; activations stay float32."""

from __future__ import annotations

import numpy as np

from feather.deploy.graph import Conv, Graph, Linear


def quantize(graph: Graph) -> Graph:
    """Round the weights of a fused graph, in place; those that round to zero are dropped like any other zero."""
    for op in graph.ops:
        if isinstance(op, Conv | Linear):
            rows = op.weight.reshape(len(op.weight), -1)
            largest = np.abs(rows).max(1, initial=0)
            op.scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            op.weight = np.rint(rows / op.scale[:, None]).astype(np.float32).reshape(op.weight.shape)
    return graph
