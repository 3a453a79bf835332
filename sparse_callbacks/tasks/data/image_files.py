"""Files of images in folders of classes, and the parts that train, validate and test."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pytorch_lightning.utilities import rank_zero_info
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.tasks.data.drawn_parts import drawn_part
from sparse_callbacks.tasks.data.module import refuse_fractions

PARTS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of the folder of each part, as data sets call them."""
SPLIT_SEED = 0  # the seed of every split, whatever the seed of the run
LEAST_IMAGES_OF_A_CLASS = 3  # one for each part
_SHOWN = 5  # files or classes that a sentence names
KINDS = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jp2")
"""How names of images end."""
LAYOUT = "Put the images of each class into a folder of its own: FOLDER/cat/1.jpg, FOLDER/dog/2.jpg."

Files = list[tuple[Path, int]]
"""Images, each with the number of its class."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder in three parts.

    Attributes:
        classes: names of the classes, sorted; a label is the place of its class in it.
        train, val, test: the images of each part, in an order that is always the same.
    """

    classes: list[str]
    train: Files
    val: Files
    test: Files


def find_images(root: str | None, val_fraction: float, test_fraction: float) -> ImageFiles:
    """The images below a folder, by their names alone: no image is opened.

    The folder holds one folder of images for each class, or folders train, val and test that do. What has no folder of
    its own is a share of the training images, stratified by class and the same in every run.

    Args:
        root: the folder.
        val_fraction, test_fraction: the shares of the images that validate and test where they have no folder.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: no root, no classes, a single class, a class without images or with too few to be split, a class in
            val or test that is not in train, or fractions that leave a part empty.
    """
    if root is None:
        raise ValueError(f"data=image_folder reads the folder that you name. Give data.root=FOLDER. {LAYOUT}")
    refuse_fractions(val_fraction, test_fraction)
    folder = Path(root)
    if not folder.is_dir():
        reason = "is a file" if folder.is_file() else "is not there"
        raise FileNotFoundError(
            f"data.root={root} {reason} (looked at {folder.absolute()}). Give data.root=FOLDER. {LAYOUT}"
        )
    own = _folders_of_parts(folder)
    if own and "train" not in own:
        raise ValueError(
            f"{folder} has {' and '.join(path.name for path in own.values())}, and no train with folders of classes in it. "
            f"Name the folder of the training images train, or give the folder of one part as data.root."
        )
    start = own.get("train", folder)
    classes = _classes(start)
    images = {"train": _images(start, classes)}
    _refuse_empty_classes(start, classes, images["train"])
    for part in ("val", "test"):
        if part in own:
            _refuse_other_classes(own[part], classes, start)
            images[part] = _images(own[part], classes)
            if not images[part]:
                raise ValueError(f"{own[part]} has no images. Remove the folder, or put images into it. {LAYOUT}")
    shares = {"val": val_fraction, "test": test_fraction}
    absent = {part: share for part, share in shares.items() if part not in images}
    images |= _split(images["train"], absent, classes, start)
    return ImageFiles(classes, images["train"], images["val"], images["test"])


def _subfolders(folder: Path) -> list[Path]:
    # hidden folders are made by programs, as is the one that macOS puts into archives
    found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
    return sorted(found, key=lambda path: path.name)


def _folders_of_parts(folder: Path) -> dict[str, Path]:
    """By part its folder, which is one that holds folders: a class may be named train as well."""
    found = {path.name.lower(): path for path in _subfolders(folder) if _subfolders(path)}
    return {part: found[name] for part, names in PARTS.items() for name in reversed(names) if name in found}


def _classes(folder: Path) -> list[str]:
    """Names of the folders of a folder.

    Raises:
        ValueError: there are fewer than two.
    """
    found = _subfolders(folder)
    if not found:
        raise ValueError(f"{folder} has no folders, and its folders are the classes. {LAYOUT}")
    if len(found) == 1:
        deeper = f" Did you mean data.root={found[0]}?" if len(_subfolders(found[0])) > 1 else ""
        raise ValueError(
            f"{folder} has the folder {found[0].name} alone, which would be the only class, and one class needs no network."
            f"{deeper or f' {LAYOUT}'}"
        )
    return [path.name for path in found]


def _images(folder: Path, classes: Sequence[str]) -> Files:
    """The images of each class, also in folders within its folder, sorted by their paths; other files are spoken of."""
    found: Files = []
    others: Counter[str] = Counter()
    for number, name in enumerate(classes):
        paths = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
        # macOS puts files named ._NAME beside those of archives
        files = [path for path in paths if not path.name.startswith(".") and not path.is_dir()]
        found += [(path, number) for path in files if has_file_allowed_extension(path.name, KINDS)]
        others.update(path.suffix for path in files if not has_file_allowed_extension(path.name, KINDS))
    if found and others:
        kinds = ", ".join(f"{count} {kind or 'without an ending'}" for kind, count in others.most_common(_SHOWN))
        rank_zero_info(
            f"{folder}: files that do not end as images do are left out: {kinds}. Convert those that are photos."
        )
    return found


def _refuse_empty_classes(folder: Path, classes: Sequence[str], images: Files) -> None:
    kinds = " ".join(KINDS)
    if not images:
        raise ValueError(f"{folder} has {len(classes)} folders and no images in them. Images end in one of {kinds}.")
    counts = np.bincount([number for _, number in images], minlength=len(classes))
    if empty := [name for name, count in zip(classes, counts, strict=True) if count == 0]:
        raise ValueError(
            f"{folder}: {', '.join(empty[:_SHOWN])} of {len(classes)} classes {_has(empty)} no images. Images end in one of "
            f"{kinds}. Remove the {_folder(empty)}, or put images into {'it' if len(empty) == 1 else 'them'}."
        )


def _refuse_other_classes(folder: Path, classes: Sequence[str], train: Path) -> None:
    other = [path.name for path in _subfolders(folder) if path.name not in classes]
    if other:
        raise ValueError(
            f"{folder} has the {_folder(other)} {', '.join(other[:_SHOWN])}, which {train} has not, so the network could not learn "
            "these classes. Give all parts folders of the same names."
        )


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _folder(names: Sequence[str]) -> str:
    return "folder" if len(names) == 1 else "folders"


def _split(images: Files, shares: Mapping[str, float], classes: Sequence[str], folder: Path) -> dict[str, Files]:
    """The training images without those that validate and test, and these, by part.

    Args:
        images: all images of the training folder.
        shares: by part that has no folder its share of all these images.
        classes: names of the classes.
        folder: the folder, for messages.

    Raises:
        ValueError: a class with too few images, or shares that leave a part with fewer images than classes.
    """
    labels = np.array([number for _, number in images])
    remaining = np.arange(len(images))
    parts: dict[str, Files] = {}
    if shares and (least := np.bincount(labels, minlength=len(classes))).min() < LEAST_IMAGES_OF_A_CLASS:
        raise ValueError(
            f"{folder}: class {classes[int(least.argmin())]} has {least.min()} images, too few to train, validate and test with: "
            f"{LEAST_IMAGES_OF_A_CLASS} are needed. Add images, or remove the class."
        )
    for part, share in shares.items():
        remaining, chosen = drawn_part(
            remaining,
            labels,
            share,
            f"data.{part}_fraction",
            str(folder),
            SPLIT_SEED,
            f"put images into a folder {folder / part}",
        )
        parts[part] = [images[index] for index in np.sort(chosen)]
    return {"train": [images[index] for index in np.sort(remaining)], **parts}


def refuse_broken_images(files: ImageFiles) -> None:
    """Read every image to its end, which finds files that are empty, cut off or no images.

    It takes less than half as long as an epoch does, as images of JPEG are decoded at an eighth of their size, by all CPUs.

    Raises:
        ValueError: files that cannot be read, by their paths.
    """
    paths = [path for path, _ in (*files.train, *files.val, *files.test)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the lock of Python
        broken = [(path, why) for path, why in zip(paths, pool.map(_why_broken, paths), strict=True) if why]
    if broken:
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise ValueError(
            f"{', '.join(str(path) for path, _ in broken[:_SHOWN])}{more} cannot be read as "
            f"{'an image' if len(broken) == 1 else 'images'} ({broken[0][1]}). Remove or replace what is broken."
        )


def _why_broken(path: Path) -> str:
    """The error of reading an image; empty where there is none."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))
            _eight_bits(image).load()
    except Exception as error:  # every reader of a kind of image has errors of its own
        return _why(error, path)
    return ""


def read_image(path: Path) -> Image.Image:
    """A whole image in RGB, upright as its camera has noted.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            # photos of phones are stored as the sensor lay, with a note of how to turn them
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # every reader of a kind of image has errors of its own
        raise ValueError(f"{path} cannot be read as an image ({_why(error, path)}). Remove or replace it.") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image with 8 bits a channel: Pillow would make everything white that is above 255.

    Raises:
        ValueError: numbers of 32 bits, which have no least and no largest value.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, 32 bits without a range; save it with 8 or 16 bits")
    return image


def _why(error: Exception, path: Path) -> str:
    # the sentence around it has said which file it is
    return f"{type(error).__name__}: {first_line(error).removesuffix(f' {str(path)!r}')}"
