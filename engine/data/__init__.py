"""Data sets as deterministic streams of device batches: digits, CIFAR-10, CIFAR-100 and ImageFolder trees.

What step k of epoch e sees depends on (seed, e, k) alone: not on the number of processes or workers, nor on whether the
run was resumed.
"""

from engine.data.base import Batch, Data, DataError, Loader
from engine.data.factory import create_data

__all__ = ["Batch", "Data", "DataError", "Loader", "create_data"]
