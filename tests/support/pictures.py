"""Folders of small pictures of unequal sizes, whose classes differ in color."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (30, 40, 200), "green": (30, 180, 40), "red": (200, 40, 30)}


def draw(folder: Path, counts: Mapping[str, int], first: int = 0) -> None:
    """Write a folder of noisy pictures for each color, by turns PNG and JPEG.

    Args:
        folder: where the folders of classes go.
        counts: the number of pictures of each color.
        first: the seed of the first picture.
    """
    source = np.random.default_rng(first)
    for color, count in counts.items():
        (folder / color).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = source.integers(20, 60, 2)
            noise = source.integers(-25, 25, (height, width, 3))
            pixels = np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / color / f"{number:03}.{('png', 'jpg')[number % 2]}")
