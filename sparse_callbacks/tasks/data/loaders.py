"""Batches whose order and augmentation derive from (seed, epoch, index) alone, so that a run resumes mid-epoch exactly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ORDER, AUGMENTATION = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Samples:
    """Images [n, channels, height, width] (uint8 in 0..255 or float in 0..1) or features [n, d] (float), with labels [n] (int64)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Samples":
        return Samples(self.inputs[indices], self.labels[indices])


Augmentation = Callable[[Tensor, Tensor], Tensor]


def generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """Random numbers of one epoch; different seeds, epochs and streams are independent (numpy's SeedSequence)."""
    mixed = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Permutation [count] of the samples in that epoch."""
    return torch.randperm(count, generator=generator(seed, epoch, ORDER))


def crop_and_flip(images: Tensor, numbers: Tensor, padding: int = 4) -> Tensor:
    """Random crop of the zero-padded image and horizontal flip, the usual augmentation of CIFAR-10.

    Args:
        images: [batch, channels, height, width].
        numbers: [batch, 3] int64: offset down and to the right in 0..2*padding, and 1 for a mirrored image.
        padding: pixels added on each side.

    Returns:
        [batch, channels, height, width] of the images' dtype.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    rows = numbers[:, 0:1] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(numbers[:, 2:3] == 1, width - 1 - columns, columns) + numbers[:, 1:2]
    batch = torch.arange(count)
    return padded[
        batch[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def crop_numbers(count: int, seed: int, epoch: int, padding: int = 4) -> Tensor:
    """Numbers [count, 3] for `crop_and_flip`, one row a sample of the set, whatever batch it comes in."""
    source = generator(seed, epoch, AUGMENTATION)
    offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=source)
    flips = torch.randint(0, 2, (count, 1), generator=source)
    return torch.cat([offsets, flips], dim=1)


class Loader:
    """Batches (inputs float32 [batch, ...], labels [batch]) of samples that lie in memory.

    Lightning restores a loader that has `state_dict` and `load_state_dict`: the position is all there is to save, since
    order and augmentation derive from (seed, epoch, index). Each rank takes every `world_size`-th sample.

    Args:
        samples: the set.
        batch_size: per process.
        mean, std: per channel or feature, or one for all; in units of images scaled to 0..1.
        seed: of order and augmentation.
        shuffle: a new order each epoch; without it the order of the samples, in every epoch.
        even: equally many samples on all ranks, which training in step needs (up to world_size - 1 are left out).
        augment: crop and flip the images.
        rank, world_size: of this process.

    Raises:
        ValueError: augmentation of features.
    """

    batch_sampler = None  # Lightning asks every loader with a sampler for it

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        mean: Tensor,
        std: Tensor,
        seed: int = 0,
        shuffle: bool = False,
        even: bool = False,
        augment: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if augment and samples.inputs.dim() != 4:
            raise ValueError(
                f"data.augment=True crops and flips images, and inputs of shape {tuple(samples.inputs.shape[1:])} are no images. "
                "Leave augment off."
            )
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.shuffle, self.even, self.augment = shuffle, even, augment
        self.rank, self.world_size = rank, world_size
        self.mean, self.std = mean, std
        scale = 255.0 if samples.inputs.dtype == torch.uint8 else 1.0
        shape = (1, -1, *[1] * (samples.inputs.dim() - 2))
        self._shift = (mean * scale).view(shape)
        self._factor = (1.0 / (std * scale)).view(shape)
        self._epoch = self._next = 0
        self._resumed: tuple[int, int] | None = None

    @property
    def sampler(self) -> "Loader":
        """Lightning announces the epoch to `loader.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def in_order(self) -> "Loader":
        """The set for a pass that learns nothing: file order, not augmented, each sample on exactly one rank.

        A loader of its own, so the position of this one stays.
        """
        share: dict[str, Any] = {"rank": self.rank, "world_size": self.world_size}
        return Loader(self.samples, self.batch_size, mean=self.mean, std=self.std, seed=self.seed, **share)

    def state_dict(self) -> dict[str, int]:
        """Epoch and the number of batches handed out in it."""
        return {"epoch": self._epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resumed = (state["epoch"], state["batch"])

    def __len__(self) -> int:
        left_over = 0 if self.even else self.rank < len(self.samples) % self.world_size
        return -(-(len(self.samples) // self.world_size + left_over) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # runs at the first batch, after Lightning announced the epoch
        resumed, self._resumed = self._resumed, None
        # a position saved in another epoch is its end
        self._next = resumed[1] if resumed is not None and resumed[0] == self._epoch else 0
        indices = self._indices()
        numbers = crop_numbers(len(self.samples), self.seed, self._epoch) if self.augment else None
        while self._next < len(self):
            chosen = indices[self._next * self.batch_size : (self._next + 1) * self.batch_size]
            self._next += 1
            yield self._batch(chosen, numbers)

    def _indices(self) -> Tensor:
        count = len(self.samples)
        order = epoch_order(count, self.seed, self._epoch) if self.shuffle else torch.arange(count)
        used = count // self.world_size * self.world_size if self.even else count
        return order[self.rank : used : self.world_size]

    def _batch(self, chosen: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = self.samples.inputs[chosen]
        if numbers is not None:
            inputs = crop_and_flip(inputs, numbers[chosen])
        return inputs.float().sub_(self._shift).mul_(self._factor), self.samples.labels[chosen]
