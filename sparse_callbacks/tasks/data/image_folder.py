"""Images in folders of classes, resized and cropped as torchvision's reference does.

Order and augmentation derive from (seed, epoch, index), so neither the number of workers nor going on within an epoch changes a batch.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode, v2

from sparse_callbacks.tasks.data.image_files import Files, find_images, read_image, refuse_broken_images
from sparse_callbacks.tasks.data.loaders import AUGMENTATION, ResumableLoader
from sparse_callbacks.tasks.data.module import refuse_batch_size, share_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
CROP_SHARE = 0.875  # of the shorter side of an image, in torchvision's reference and in most of timm
MOST_WORKERS = 4  # more of them rarely read images faster than a network of such a size takes them
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

Sample = tuple[int, int | None]
"""The index of an image and the epoch that its augmentation derives from; None for an evaluation."""


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of the random numbers of one sample in one epoch, independent of all other seeds, epochs and samples."""
    return int(np.random.SeedSequence([seed, epoch, AUGMENTATION, index]).generate_state(1, np.uint64)[0]) & (2**63 - 1)


class ImageSamples(Dataset[Any]):
    """Images of files as tensors [3, size, size] with their labels.

    A sample is asked for by its index and an epoch, so that its random numbers are the same in whichever process and order it
    is made.

    Args:
        files: the images with the numbers of their classes.
        augmented, plain: make a tensor of an image, with and without random changes.
        seed: the seed of augmentation.
    """

    def __init__(self, files: Files, augmented: v2.Transform, plain: v2.Transform, seed: int) -> None:
        self.files, self.augmented, self.plain, self.seed = files, augmented, plain, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int] | ValueError:
        index, epoch = sample
        path, label = self.files[index]
        try:
            image = read_image(path)
        except ValueError as error:
            # a value until it is in the process of the run: what a worker raises is wrapped in frames
            return ValueError(str(error))
        if epoch is None:
            return self.plain(image), label
        # torchvision draws from the generator of the process, which nobody else may see moved; devices have their own
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
            return self.augmented(image), label


def collate(samples: Sequence[Any]) -> Any:
    """A batch of samples; the error of the first image that cannot be read, where there is one."""
    for sample in samples:
        if isinstance(sample, ValueError):
            return sample
    return default_collate(list(samples))


class ImageLoader(ResumableLoader):
    """Batches (inputs float32 [batch, 3, size, size], labels [batch]) of images in files.

    Neither the number of workers nor that of processes changes the batches of a seed, nor does going on within an epoch.

    Args:
        samples: the images.
        batch_size: the number of images in a batch of one process.
        workers: the number of processes that read images; 0 reads them in that of the run.
        pinned: whether batches are put into memory that a GPU copies from while the run goes on.
        options: further arguments of `ResumableLoader`.
    """

    def __init__(
        self,
        samples: ImageSamples,
        batch_size: int,
        *,
        workers: int = 0,
        pinned: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(len(samples), batch_size, **options)
        self.samples, self.workers, self.pinned = samples, workers, pinned
        self._asked: list[list[Sample]] = []
        self._reader: DataLoader[Any] | None = None

    def in_order(self) -> Self:
        plain = super().in_order()
        # a reader of its own, as that of this loader may be within an epoch
        plain._asked, plain._reader = [], None
        return plain

    def batches(self, chosen: Sequence[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        number = epoch if self.augment else None
        # in place, as the reader keeps the list; its workers get the indices that they are asked for, and stay for all epochs
        self._asked[:] = [[(int(index), number) for index in indices] for indices in chosen]
        if self._reader is None:
            self._reader = DataLoader(
                self.samples,
                batch_sampler=self._asked,
                num_workers=self.workers,
                collate_fn=collate,
                pin_memory=self.pinned,
                persistent_workers=self.workers > 0,
                # it draws a seed for its workers, which would move the generator of the run
                generator=torch.Generator(),
            )
        for batch in self._reader:
            if isinstance(batch, ValueError):
                raise ValueError(str(batch))
            yield tuple(batch)


class FolderData(pl.LightningDataModule):
    """Training, validation and test images of a folder; see `image_folder`."""

    def __init__(
        self,
        parts: Sequence[ImageSamples],
        classes: list[str],
        *,
        image_size: int,
        batch_size: int,
        workers: int,
        augment: bool,
        seed: int,
        preprocessing: dict[str, Any],
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = parts
        self.class_names, self.num_classes = classes, len(classes)
        self.input_shape = (3, image_size, image_size)
        self.batch_size, self.workers, self.augment, self.seed = batch_size, workers, augment, seed
        self.preprocessing = preprocessing

    def train_dataloader(self) -> ImageLoader:
        return self._loader(self.train, shuffle=True, even=True, augment=self.augment)

    def val_dataloader(self) -> ImageLoader:
        return self._loader(self.val)

    def test_dataloader(self) -> ImageLoader:
        return self._loader(self.test)

    def _loader(self, samples: ImageSamples, **options: Any) -> ImageLoader:
        trainer = self.trainer
        pinned = trainer is not None and isinstance(trainer.accelerator, CUDAAccelerator)
        options |= share_of(trainer)
        return ImageLoader(samples, self.batch_size, workers=self.workers, pinned=pinned, seed=self.seed, **options)


def image_folder(
    root: str | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: bool = True,
    crop_scale: Sequence[float] = (0.08, 1.0),
    flip: float = 0.5,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    check: bool = True,
    batch_size: int = 32,
    workers: int | None = 0,
    seed: int = 0,
) -> FolderData:
    """Images of any size in folders of classes, as `find_images` finds them.

    Training images are cropped and flipped at random; validation and test images are resized and cropped in the middle. All are
    RGB and normalised.

    Args:
        root: the folder.
        image_size: height and width of what the network gets, in pixels; None for 224.
        resize: the shorter side of an image of which the middle is taken, in pixels; None for `image_size` / 0.875.
        interpolation: nearest, bilinear, bicubic or lanczos; None for bilinear.
        mean, std: the values that normalise each channel, in units of images scaled to 0..1; None for those of ImageNet.
        augment: whether training images are changed at random; else they are resized and cropped as the others.
        crop_scale: the least and the largest share of an image's area that a random crop has.
        flip: the probability that a training image is mirrored.
        val_fraction, test_fraction: the shares of the images that validate and test where these have no folder.
        check: whether every file is read before training, to find broken ones.
        batch_size: the number of images in a micro-batch of one process.
        workers: the number of processes that read images; 0 reads them in that of the run, and None takes one for each CPU that
            the run may use, at most four.
        seed: the seed of order and augmentation; the split into parts does not depend on it.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: whatever `find_images` refuses, broken images, or a value out of range.
    """
    refuse_batch_size(batch_size)
    if workers is None:
        workers = min(
            MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    size = IMAGE_SIZE if image_size is None else image_size
    shorter = round(size / CROP_SHARE) if resize is None else resize
    channel_mean, channel_std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    named = interpolation or "bilinear"
    refuse_transforms(size, shorter, named, channel_mean, channel_std, crop_scale, flip, workers)
    files = find_images(root, val_fraction, test_fraction)
    if check:
        refuse_broken_images(files)
    mode = InterpolationMode(named)
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(channel_mean), list(channel_std))]
    plain = v2.Compose([v2.Resize(shorter, mode), v2.CenterCrop(size), *end])
    low, high = crop_scale
    cropped = v2.RandomResizedCrop(size, scale=(low, high), interpolation=mode)
    augmented = v2.Compose([cropped, v2.RandomHorizontalFlip(flip), *end])
    return FolderData(
        [ImageSamples(part, augmented, plain, seed) for part in (files.train, files.val, files.test)],
        files.classes,
        image_size=size,
        batch_size=batch_size,
        workers=workers,
        augment=augment,
        seed=seed,
        preprocessing={
            "classes": files.classes,
            "orientation": "upright, as EXIF says",
            "color": "RGB",
            "resize_shorter_side": shorter,
            "center_crop": size,
            "interpolation": named,
            "scale": "1/255",
            "mean": list(channel_mean),
            "std": list(channel_std),
            "layout": "batch, channels, height, width",
        },
    )


def refuse_transforms(
    image_size: int,
    resize: int,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: Sequence[float],
    flip: float,
    workers: int,
) -> None:
    """Refuse numbers with which no image could be made.

    Raises:
        ValueError: one is out of range.
    """
    if image_size < 1:
        raise ValueError(
            f"data.image_size={image_size} is not a number of pixels. Give for example data.image_size=224."
        )
    if resize < image_size:
        raise ValueError(
            f"data.resize={resize} is smaller than data.image_size={image_size}, which is cut out of it. Give at least "
            f"{image_size}, or null for {round(image_size / CROP_SHARE)}."
        )
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"data.interpolation={interpolation!r} is not known. Choose one of {', '.join(INTERPOLATIONS)}."
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            kind = "numbers above 0" if name == "std" else "numbers"
            raise ValueError(
                f"data.{name}={list(values)} is not a list of three {kind}, one for each channel of RGB. Give null for the "
                "values of the model, or of ImageNet."
            )
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(
            f"data.crop_scale={list(crop_scale)} is not a least and a largest share of an image's area, above 0 and at most 1. "
            "Give for example data.crop_scale=[0.08,1.0]."
        )
    if not 0 <= flip <= 1:
        raise ValueError(f"data.flip={flip} is not a probability. Give 0 to 1, e.g. 0 where left and right matter.")
    if workers < 0:
        raise ValueError(f"data.workers={workers} is not a number of processes. Give 0 for none, or for example 4.")
