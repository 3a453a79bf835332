"""Loaders whose order and augmentation derive from (seed, epoch, index).

Nothing else is needed to make a batch again, so a run resumes exactly in the middle of an epoch.

StatefulDataLoader of torchdata (0.11) is not used: it restores the order of the samples, but not the random numbers of an
augmentation that torchvision draws, neither with workers nor without, and it refuses a state of another kind of workers.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# random numbers of one epoch come from separate streams, so that augmentation does not change the order
ORDER, AUGMENTATION = 0, 1


@dataclass(frozen=True)
class Samples:
    """Samples with their labels.

    Attributes:
        inputs: images [n, channels, height, width] (uint8 in 0..255, or float in 0..1) or features [n, d] (float).
        labels: numbers of the classes [n] (int64).
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Samples":
        """The samples at these indices, in their order."""
        return Samples(self.inputs[indices], self.labels[indices])


def generator(seed: int, epoch: int, stream: int) -> torch.Generator:
    """A generator for one stream of random numbers of one epoch, independent of all other seeds, epochs and streams."""
    # a SeedSequence mixes the three numbers; a sum would give neighbouring seeds and epochs the same numbers
    mixed = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    # torch takes seeds as signed 64-bit numbers, so the highest bit goes
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Permutation [count] of the samples in that epoch."""
    return torch.randperm(count, generator=generator(seed, epoch, ORDER))


def crop_and_flip(images: Tensor, numbers: Tensor, padding: int = 4) -> Tensor:
    """Random crop of the zero-padded image and horizontal flip, the usual augmentation of CIFAR-10.

    Args:
        images: the images [batch, channels, height, width].
        numbers: the random numbers [batch, 3] (int64) of the images: the offsets of the crop from the top and from the
            left in 0..2*padding, and 1 for a mirrored image.
        padding: the number of pixels that are added on each side.

    Returns:
        New images [batch, channels, height, width] of the same dtype.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    # one gather by index arrays for the whole batch: a loop over images would take most of the time of a small network
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
    """Random numbers [count, 3] for `crop_and_flip`, one row for each sample of the set.

    A row belongs to its sample, so the batch size and the number of processes do not change the augmentation.
    """
    source = generator(seed, epoch, AUGMENTATION)
    offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=source)
    flips = torch.randint(0, 2, (count, 1), generator=source)
    return torch.cat([offsets, flips], dim=1)


class ResumableLoader(ABC):
    """Batches (inputs [batch, ...], labels [batch]), of which a subclass makes each one from the indices of its samples.

    Lightning restores a loader that has `state_dict` and `load_state_dict`. Only the position is saved, since order and
    augmentation derive from (seed, epoch, index). Each rank takes every `world_size`-th sample.

    Args:
        count: the number of samples.
        batch_size: the number of samples in a batch of one process.
        seed: the seed of order and augmentation.
        shuffle: whether each epoch has a new order; else every epoch has the order of the samples.
        even: whether all ranks get the same number of samples, without which ranks that train together would wait for
            each other forever; up to world_size - 1 samples are left out for it.
        augment: whether samples are changed at random.
        rank, world_size: the rank of this process and the number of processes.
    """

    # Lightning reads this attribute of every loader that has a sampler
    batch_sampler = None

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        even: bool = False,
        augment: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.shuffle, self.even, self.augment = shuffle, even, augment
        self.rank, self.world_size = rank, world_size
        self._epoch = self._next = 0
        self._resumed: tuple[int, int] | None = None

    def in_order(self) -> Self:
        """A new loader of the same samples, unshuffled and not augmented, with each sample on exactly one rank.

        It is for a pass over the data between training steps: the position of this loader does not change.
        """
        plain = copy.copy(self)
        plain.shuffle = plain.even = plain.augment = False
        plain._epoch = plain._next = 0
        plain._resumed = None
        return plain

    @abstractmethod
    def batches(self, chosen: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, one at a time.

        Args:
            chosen: the indices [batch] of the samples of each batch.
            epoch: the number of the epoch, which augmentation derives from.
        """

    @property
    def sampler(self) -> "ResumableLoader":
        """The loader itself: Lightning calls `loader.sampler.set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the iterations that begin from now on."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The current epoch and the number of batches that were taken in it."""
        return {"epoch": self._epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where `state` was saved, if it is of the same epoch."""
        # kept until an iteration begins, because the epoch is announced only after this call
        self._resumed = (state["epoch"], state["batch"])

    def __len__(self) -> int:
        count = self.count // self.world_size
        # samples that are left over go to the first ranks
        if not self.even and self.rank < self.count % self.world_size:
            count += 1
        return math.ceil(count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # the body of a generator runs at the first batch: Lightning makes the iterator before it announces the epoch
        resumed, self._resumed = self._resumed, None
        self._next = 0
        if resumed is not None and resumed[0] == self._epoch:
            self._next = resumed[1]
        # else the position was the end of an earlier epoch, and this epoch begins at its first batch
        # up to its length, as nothing splits into one batch without samples
        chosen = torch.split(self._indices(), self.batch_size)[self._next : len(self)]
        for batch in self.batches(chosen, self._epoch):
            # before the batch is used: a checkpoint after its step must not repeat it
            self._next += 1
            yield batch

    def _indices(self) -> Tensor:
        count = self.count
        order = epoch_order(count, self.seed, self._epoch) if self.shuffle else torch.arange(count)
        if self.even:
            count -= count % self.world_size
        return order[self.rank : count : self.world_size]


class Loader(ResumableLoader):
    """Batches (inputs float32 [batch, ...], labels [batch]) of samples in memory.

    Args:
        samples: the samples.
        batch_size: the number of samples in a batch of one process.
        mean, std: the values that normalise the inputs, one for each channel or feature, or one for all; in units of
            images scaled to 0..1.
        augment: whether images are cropped and flipped at random.
        options: further arguments of `ResumableLoader`.

    Raises:
        ValueError: augmentation of features.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        *,
        mean: Tensor,
        std: Tensor,
        augment: bool = False,
        **options: Any,
    ) -> None:
        if augment and samples.inputs.dim() != 4:
            raise ValueError(
                f"data.augment=True crops and flips images, and inputs of shape {tuple(samples.inputs.shape[1:])} "
                "are not images. Leave augment off."
            )
        super().__init__(len(samples), batch_size, augment=augment, **options)
        self.samples = samples
        self.mean, self.std = mean, std
        # bytes are normalised in one step, (x - 255 * mean) / (255 * std), without a pass that scales them to 0..1
        scale = 255.0 if samples.inputs.dtype == torch.uint8 else 1.0
        shape = (1, -1, *[1] * (samples.inputs.dim() - 2))
        self._shift = (mean * scale).view(shape)
        self._factor = (1.0 / (std * scale)).view(shape)

    def batches(self, chosen: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = crop_numbers(self.count, self.seed, epoch) if self.augment else None
        for indices in chosen:
            yield self._batch(indices, numbers)

    def _batch(self, chosen: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = self.samples.inputs[chosen]
        if numbers is not None:
            inputs = crop_and_flip(inputs, numbers[chosen])
        return inputs.float().sub_(self._shift).mul_(self._factor), self.samples.labels[chosen]
