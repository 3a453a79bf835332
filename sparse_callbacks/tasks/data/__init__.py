"""Data modules that `train.py` reads, by name in `conf/data`."""

from sparse_callbacks.tasks.data.module import MemoryData, digits, torchvision_set

__all__ = ["MemoryData", "digits", "torchvision_set"]
