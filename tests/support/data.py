"""A loader of random numbers for tests of single methods."""

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset


def loader(batches: int, batch_size: int = 4, inputs: int = 12, outputs: int = 6, seed: int = 7) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * batch_size, inputs, generator=generator)
    y = torch.randn(batches * batch_size, outputs, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)
