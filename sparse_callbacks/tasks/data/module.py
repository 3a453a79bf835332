"""Data modules in memory: scikit-learn's digits, MNIST, Fashion-MNIST and CIFAR-10."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from sparse_callbacks.tasks.data.loaders import Loader, Samples

# the class of torchvision, and mean and standard deviation of each channel of the training set, for images in 0..1
SETS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ("MNIST", (0.1307,), (0.3081,)),
    "fashion_mnist": ("FashionMNIST", (0.2860,), (0.3530,)),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def refuse_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1.

    Raises:
        ValueError: it is below 1.
    """
    if batch_size < 1:
        raise ValueError(
            f"data.batch_size={batch_size} is not a number of samples. Give 1 or more, e.g. data.batch_size=100."
        )


def refuse_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuse shares that leave nothing to train, validate or test.

    Raises:
        ValueError: a share is not above 0, or both together are not below 1.
    """
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave one of the three parts "
            "empty. Give shares above 0 with a sum below 1, e.g. 0.1 and 0.2."
        )


class MemoryData(pl.LightningDataModule):
    """Training, validation and test samples with their loaders.

    Args:
        train, val, test: the samples of the three parts.
        num_classes: the number of classes; labels are 0..num_classes - 1.
        mean, std: the values that normalise the inputs, one for each channel or feature, or one for all; in units of
            images scaled to 0..1.
        batch_size: the number of training samples in a micro-batch of one process.
        seed: the seed of order and augmentation; the split into parts does not depend on it.
        shuffle: whether each epoch has a new order of the training samples; else every epoch has that of `train`.

    Raises:
        ValueError: a batch size below 1.
    """

    augment = False

    def __init__(
        self,
        train: Samples,
        val: Samples,
        test: Samples,
        *,
        num_classes: int,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        refuse_batch_size(batch_size)
        self.train, self.val, self.test = train, val, test
        self.num_classes, self.batch_size, self.seed, self.shuffle = num_classes, batch_size, seed, shuffle
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample: (channels, height, width) or (features,)."""
        return tuple(self.train.inputs.shape[1:])

    def train_dataloader(self) -> Loader:
        return self._loader(self.train, self.batch_size, shuffle=self.shuffle, even=True, augment=self.augment)

    def val_dataloader(self) -> Loader:
        return self._loader(self.val, self._evaluation_batch_size)

    def test_dataloader(self) -> Loader:
        return self._loader(self.test, self._evaluation_batch_size)

    @property
    def _evaluation_batch_size(self) -> int:
        # an evaluation keeps no activations for a backward pass, so larger batches fit into memory
        return max(self.batch_size, 500)

    def _loader(self, samples: Samples, size: int, **options: Any) -> Loader:
        return Loader(samples, size, mean=self.mean, std=self.std, seed=self.seed, **options, **share_of(self.trainer))


def share_of(trainer: Any) -> dict[str, Any]:
    """The arguments `rank` and `world_size` of a loader; without a distributed sampler each process has all samples."""
    # Lightning keeps the Trainer's argument use_distributed_sampler nowhere else
    if trainer is None or not trainer._accelerator_connector.use_distributed_sampler:
        return {"rank": 0, "world_size": 1}
    return {"rank": trainer.global_rank, "world_size": trainer.world_size}


class ImageData(MemoryData):
    """Training, validation and test images.

    Args:
        train, val, test: the samples of the three parts.
        augment: whether training images are cropped and flipped at random.
        options: further arguments of `MemoryData`.
    """

    def __init__(self, train: Samples, val: Samples, test: Samples, *, augment: bool = False, **options: Any) -> None:
        super().__init__(train, val, test, **options)
        self.augment = augment


def digits(batch_size: int = 32, seed: int = 0, val_fraction: float = 0.15, test_fraction: float = 0.25) -> ImageData:
    """The 1,797 handwritten digits of scikit-learn, 1 x 8 x 8, in one fixed stratified split; no download is needed.

    Args:
        batch_size, seed: as in `MemoryData`.
        val_fraction, test_fraction: shares of all images that validate and test.

    Raises:
        ValueError: shares that leave a part empty.
    """
    refuse_fractions(val_fraction, test_fraction)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()  # a pixel is a count from 0 to 16
    everything = Samples(torch.tensor(source.images / 16.0, dtype=torch.float32)[:, None], torch.tensor(source.target))
    classes = source.target
    remaining, test = train_test_split(
        np.arange(len(everything)), test_size=test_fraction, stratify=classes, random_state=0
    )
    # the second split is of what the first has left, while the fractions are of all images
    share = val_fraction / (1.0 - test_fraction)
    train, val = train_test_split(remaining, test_size=share, stratify=classes[remaining], random_state=0)
    parts = [everything.take(torch.as_tensor(np.sort(part))) for part in (train, val, test)]
    return ImageData(*parts, num_classes=10, mean=(0.305,), std=(0.376,), batch_size=batch_size, seed=seed)


def torchvision_set(
    name: str,
    root: str = "data",
    download: bool = False,
    batch_size: int = 100,
    seed: int = 0,
    val_count: int = 5000,
    augment: bool = False,
) -> ImageData:
    """MNIST, Fashion-MNIST or CIFAR-10 from torchvision's files.

    Args:
        name: mnist, fashion_mnist or cifar10.
        root: the folder of torchvision's files.
        download: whether torchvision may download absent files.
        batch_size, seed: as in `MemoryData`.
        val_count: the number of training images, always the same ones, that validate.
        augment: whether training images are cropped and flipped at random.

    Raises:
        FileNotFoundError: the files are not there, or the download failed.
        ValueError: an unknown name, or a `val_count` that leaves no training images.
    """
    if name not in SETS:
        raise ValueError(f"data.name={name!r} is not known. Known sets: {', '.join(SETS)}.")
    if val_count < 1:
        raise ValueError(
            f"data.val_count={val_count} does not leave both training and validation images. Give e.g. data.val_count=5000."
        )
    _, mean, std = SETS[name]
    everything = _read(name, root, download, train=True)
    test = _read(name, root, download, train=False)
    if val_count >= len(everything):
        raise ValueError(
            f"data.val_count={val_count} does not leave both training and validation images of {len(everything)}. "
            "Give e.g. data.val_count=5000."
        )
    # always the same images, whatever the seed of the run, so that runs with different seeds can be compared
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    val = everything.take(order[:val_count].sort().values)
    train = everything.take(order[val_count:].sort().values)
    return ImageData(
        train, val, test, num_classes=10, mean=mean, std=std, batch_size=batch_size, seed=seed, augment=augment
    )


def _read(name: str, root: str, download: bool, train: bool) -> Samples:
    from torchvision import datasets

    try:
        source = getattr(datasets, SETS[name][0])(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        reason = f"the download failed ({error})" if download else "its files are not there"
        raise FileNotFoundError(
            f"data={name}: cannot read the set from {Path(root).resolve()}, because {reason}. "
            "Say where it lies with data.root=FOLDER, or let torchvision fetch it with data.download=true; "
            "data=digits needs no files."
        ) from None
    return Samples(_channels_first(torch.as_tensor(source.data)), torch.as_tensor(source.targets))


def _channels_first(images: Tensor) -> Tensor:
    """Images [n, height, width] or [n, height, width, channels] as [n, channels, height, width]."""
    if images.dim() == 3:
        return images[:, None]
    return images.permute(0, 3, 1, 2).contiguous()
