"""Sets of images at half their height and width, for tables of many runs: `data._target_=pooled_images.halved`."""

from typing import Any

import torch
from torch.nn.functional import avg_pool2d

from sparse_callbacks.tasks.data import torchvision_set
from sparse_callbacks.tasks.data.loaders import Samples
from sparse_callbacks.tasks.data.module import ImageData


def halved(name: str, **options: Any) -> ImageData:
    """`torchvision_set` with the mean of every two by two pixels, rounded, in place of the pixels.

    Args:
        name, options: as in `torchvision_set`.
    """
    data = torchvision_set(name, **options)
    data.train, data.val, data.test = (pooled(part) for part in (data.train, data.val, data.test))
    return data


def pooled(samples: Samples) -> Samples:
    """Samples with pooled inputs, of shape (n, channels, height / 2, width / 2) and type uint8."""
    return Samples(avg_pool2d(samples.inputs.float(), 2).round().to(torch.uint8), samples.labels)
