"""Classification of rows of numbers: Madelon, and any .mat, .npz or .csv file, held in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparse_callbacks.tasks.data.loaders import Samples
from sparse_callbacks.tasks.data.module import MemoryData
from sparse_callbacks.tasks.data.table_files import Array, first, read, read_uci

SCALERS = ("standard", "minmax", "none")
RANDOM_STATE = 42  # of every split, whatever the seed of the run
LEAST = 3  # samples of a class: one for each part


def madelon(root: str = "data", batch_size: int = 100, seed: int = 0, shuffle: bool = True) -> MemoryData:
    """Madelon (Guyon et al. 2004) from its UCI files in `root`/madelon: 500 features, 2 classes.

    As in CTRE's published code, a tenth of the 2,000 training samples validates (random state 42, not stratified), the
    official validation part of 600 is the test set, and the standard scaler is fitted to the training part alone. The
    training samples are in the order of that split.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: files that do not fit each other, or a feature that is no number.
    """
    from sklearn.model_selection import train_test_split

    (features, labels), (tested, answers) = (read_uci(Path(root) / "madelon", part) for part in ("train", "valid"))
    train, val = train_test_split(np.arange(len(features)), test_size=0.1, random_state=RANDOM_STATE)
    classes, numbers = np.unique(np.concatenate([labels, answers]), return_inverse=True)
    parts = scaled("standard", features[train], features[val], tested)
    split = (numbers[train], numbers[val], numbers[len(labels) :])
    return _data(parts, split, len(classes), batch_size, seed, shuffle)


def tabular(
    path: str | None = None,
    root: str = ".",
    features: str = "X",
    labels: str | int | None = None,
    header: bool = True,
    scaler: str = "standard",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    batch_size: int = 100,
    seed: int = 0,
    shuffle: bool = True,
) -> MemoryData:
    """A .mat, .npz or .csv file of numeric features and labels of any kind, split once, in a random order, by class.

    Args:
        path: of the file, absolute or within `root`.
        root: folder.
        features: name of the array [n, d] in a .mat or .npz file.
        labels: name of the array [n], None for "Y"; for .csv the column by its name or index, None for the last.
        header: the first line of a .csv file has the names of its columns.
        scaler: standard (mean 0, variance 1), minmax (0 to 1) or none; fitted to the training part.
        val_fraction, test_fraction: shares of all samples.
        batch_size, seed, shuffle: as in `MemoryData`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, absent arrays or columns, features that are no finite numbers, samples
            without a label, a class too small for the split, or an argument that is none of the above.
    """
    file = _checked_file(path, root, scaler, val_fraction, test_fraction)
    table, column = read(file, features, labels, header)
    numbers, classes = class_numbers(column, file)
    train, val, test = stratified(numbers, val_fraction, test_fraction, file)
    parts = scaled(scaler, *(table[part] for part in (train, val, test)))
    return _data(parts, (numbers[train], numbers[val], numbers[test]), classes, batch_size, seed, shuffle)


def _checked_file(path: str | None, root: str, scaler: str, val_fraction: float, test_fraction: float) -> Path:
    """The file, after all that can be found wrong before it is read."""
    if path is None:
        raise ValueError("data=tabular reads the file that you name. Give data.path=FILE (.mat, .npz or .csv).")
    if scaler not in SCALERS:
        raise ValueError(f"data.scaler={scaler!r} is not known. Choose one of {', '.join(SCALERS)}.")
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave one of the three parts empty. "
            "Give shares above 0 with a sum below 1, e.g. 0.1 and 0.2."
        )
    file = Path(root) / path
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "is not there"
        raise FileNotFoundError(
            f"data.path={path} {what} (looked at {file.absolute()}). Give data.path=FILE, absolute or within data.root=FOLDER."
        )
    return file


def _data(parts: Sequence[Array], labels: Sequence[Array], classes: int, batch_size: int, seed: int, shuffle: bool) -> MemoryData:
    train, val, test = (
        Samples(torch.from_numpy(rows), torch.from_numpy(numbers.astype(np.int64))) for rows, numbers in zip(parts, labels, strict=True)
    )
    return MemoryData(train, val, test, num_classes=classes, batch_size=batch_size, seed=seed, shuffle=shuffle)


def scaled(scaler: str, train: Array, *others: Array) -> list[Array]:
    """float32 copies of the parts [n, d], scaled with what the first alone tells; a constant column keeps a scale of 1."""
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    if scaler == "none":
        return [part.astype(np.float32) for part in (train, *others)]
    fitted = (StandardScaler() if scaler == "standard" else MinMaxScaler()).fit(train)
    return [fitted.transform(part).astype(np.float32) for part in (train, *others)]


def class_numbers(labels: Array, file: Path) -> tuple[Array, int]:
    """Labels of any kind as 0..n-1 in their sorted order, and n.

    Raises:
        ValueError: samples without a label, a single class, or a class with fewer samples than parts.
    """
    missing: Array = np.asarray(labels == "" if labels.dtype.kind == "U" else labels != labels)  # NaN differs from itself
    if missing.any():
        raise ValueError(f"{file}: {int(missing.sum())} samples have no label, the first is row {first(missing)}. Remove these rows.")
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{file}: all labels are {classes[0]!s}, and one class needs no network. Check data.labels.")
    if counts.min() < LEAST:
        raise ValueError(
            f"{file}: class {classes[counts.argmin()]!s} of {len(classes)} has {counts.min()} samples, too few to train, validate and test "
            f"with: {LEAST} are needed. Remove the class, merge it with another, or check data.labels."
        )
    return numbers, len(classes)


def stratified(labels: Array, val_fraction: float, test_fraction: float, file: Path) -> tuple[Array, Array, Array]:
    """Indices of the training, validation and test part, in random order; each class has its share in each.

    Raises:
        ValueError: a part smaller than the number of classes.
    """
    from sklearn.model_selection import train_test_split

    # counts, because a share of the rest would be rounded up where it is off by one bit
    vals, tests = (round(fraction * len(labels)) for fraction in (val_fraction, test_fraction))
    try:
        rest, test = train_test_split(np.arange(len(labels)), test_size=tests, stratify=labels, random_state=RANDOM_STATE)
        train, val = train_test_split(rest, test_size=vals, stratify=labels[rest], random_state=RANDOM_STATE)
    except ValueError as error:
        raise ValueError(
            f"{file}: {len(labels)} samples cannot be split by class with data.val_fraction={val_fraction} and "
            f"data.test_fraction={test_fraction}: {error}. Change the fractions."
        ) from None
    return train, val, test
