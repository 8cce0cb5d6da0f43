"""SET, https://arxiv.org/abs/1707.04780: as RigL, but new connections grow at random.

RigL's interval, end and cosine fraction are used for both (inferred: the paper replaces a constant fraction at each
epoch).
"""

from __future__ import annotations

import torch
from torch import Tensor

from feather.baselines.rigl import RigL


class SET(RigL):
    """Dynamic sparse training: drop by magnitude, grow at random."""

    def growth_score(self, index: int, grad: Tensor) -> Tensor:
        return torch.rand(grad.shape, generator=self._generator(index, self._step)).to(grad.device)
