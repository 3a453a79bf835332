"""Data modules of tables with numeric features: Madelon, and any .mat, .npz or .csv file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparse_callbacks.tasks.data.drawn_parts import drawn_part
from sparse_callbacks.tasks.data.loaders import Samples
from sparse_callbacks.tasks.data.module import MemoryData, refuse_fractions
from sparse_callbacks.tasks.data.table_files import Array, first_row, read, read_uci

SCALERS = ("standard", "minmax", "none")
RANDOM_STATE = 42  # the seed of every split, whatever the seed of the run; the value is that of CTRE's published code
LEAST_SAMPLES_OF_A_CLASS = 3  # one for each part


def madelon(root: str = "data", batch_size: int = 100, seed: int = 0, shuffle: bool = True) -> MemoryData:
    """Madelon (Guyon et al. 2004) from its UCI files in `root`/madelon: 500 features, 2 classes.

    As in CTRE's published code, a tenth of the 2,000 training samples validates (random state 42, not stratified), the
    official validation part of 600 samples is the test set, and the standard scaler is fitted to the training part
    alone. The training samples are in the order of that split.

    Args:
        root: the folder that holds the folder madelon.
        batch_size, seed, shuffle: as in `MemoryData`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: files that do not fit each other, or a feature that is not a number.
    """
    from sklearn.model_selection import train_test_split

    folder = Path(root) / "madelon"
    features, labels = read_uci(folder, "train")
    test_features, test_labels = read_uci(folder, "valid")
    train, val = train_test_split(np.arange(len(features)), test_size=0.1, random_state=RANDOM_STATE)
    # the labels are -1 and 1; both files are numbered together, so that a number means the same class in all parts
    classes, numbers = np.unique(np.concatenate([labels, test_labels]), return_inverse=True)
    parts = scaled("standard", features[train], features[val], test_features)
    part_labels = (numbers[train], numbers[val], numbers[len(labels) :])
    return _memory_data(parts, part_labels, len(classes), batch_size, seed, shuffle)


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
    """A .mat, .npz or .csv file of numeric features and labels of any kind, in one random split, stratified by class.

    Args:
        path: the path of the file, absolute or within `root`.
        root: the folder that a relative `path` starts from.
        features: the name of the array [n, d] in a .mat or .npz file.
        labels: the name of the array [n] in a .mat or .npz file, None for "Y"; the name or index of the column in a
            .csv file, None for the last column.
        header: whether the first line of a .csv file has the names of its columns.
        scaler: standard (mean 0, variance 1), minmax (0 to 1) or none; it is fitted to the training part alone.
        val_fraction, test_fraction: the shares of all samples that validate and test.
        batch_size, seed, shuffle: as in `MemoryData`.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: a file of another kind, absent arrays or columns, features that are not finite numbers, samples
            without a label, a class too small for the split, or an argument that is none of the above.
    """
    file = _checked_file(path, root, scaler, val_fraction, test_fraction)
    table, column = read(file, features, labels, header)
    numbers, classes = class_numbers(column, file)
    train, val, test = stratified(numbers, val_fraction, test_fraction, file)
    parts = scaled(scaler, table[train], table[val], table[test])
    return _memory_data(parts, (numbers[train], numbers[val], numbers[test]), classes, batch_size, seed, shuffle)


def _checked_file(path: str | None, root: str, scaler: str, val_fraction: float, test_fraction: float) -> Path:
    """The path of the file, after the arguments have been checked and before the file is read."""
    if path is None:
        raise ValueError("data=tabular reads the file that you name. Give data.path=FILE (.mat, .npz or .csv).")
    if scaler not in SCALERS:
        raise ValueError(f"data.scaler={scaler!r} is not known. Choose one of {', '.join(SCALERS)}.")
    refuse_fractions(val_fraction, test_fraction)
    file = Path(root) / path
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "is not there"
        raise FileNotFoundError(
            f"data.path={path} {reason} (looked at {file.absolute()}). "
            "Give data.path=FILE, absolute or within data.root=FOLDER."
        )
    return file


def _memory_data(
    parts: Sequence[Array], labels: Sequence[Array], classes: int, batch_size: int, seed: int, shuffle: bool
) -> MemoryData:
    """The data module of features and labels of the training, validation and test part."""
    train, val, test = (
        Samples(torch.from_numpy(rows), torch.from_numpy(numbers.astype(np.int64)))
        for rows, numbers in zip(parts, labels, strict=True)
    )
    return MemoryData(train, val, test, num_classes=classes, batch_size=batch_size, seed=seed, shuffle=shuffle)


def scaled(scaler: str, train: Array, *others: Array) -> list[Array]:
    """Scaled float32 copies of the parts [n, d].

    Args:
        scaler: standard, minmax or none.
        train: the part that the scaler is fitted to; it does not scale a constant column, only shifts it.
        others: further parts, scaled in the same way.
    """
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    if scaler == "none":
        return [part.astype(np.float32) for part in (train, *others)]
    fitted = (StandardScaler() if scaler == "standard" else MinMaxScaler()).fit(train)
    return [fitted.transform(part).astype(np.float32) for part in (train, *others)]


def class_numbers(labels: Array, file: Path) -> tuple[Array, int]:
    """Labels of any kind as numbers 0..n-1 in their sorted order, and the number n of classes.

    Args:
        labels: the labels [samples], numbers or words.
        file: the file that they are from, for messages.

    Raises:
        ValueError: samples without a label, a single class, or a class with fewer samples than parts.
    """
    # a missing word is empty, a missing number is NaN, which alone differs from itself
    missing: Array = np.asarray(labels == "" if labels.dtype.kind == "U" else labels != labels)
    if missing.any():
        raise ValueError(
            f"{file}: {int(missing.sum())} samples have no label, the first is row {first_row(missing)}. "
            "Remove these rows."
        )
    classes, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{file}: all labels are {classes[0]!s}, and one class needs no network. Check data.labels.")
    if counts.min() < LEAST_SAMPLES_OF_A_CLASS:
        raise ValueError(
            f"{file}: class {classes[counts.argmin()]!s} of {len(classes)} has {counts.min()} samples, too few to "
            f"train, validate and test with: {LEAST_SAMPLES_OF_A_CLASS} are needed. "
            "Remove the class, merge it with another, or check data.labels."
        )
    return numbers, len(classes)


def stratified(labels: Array, val_fraction: float, test_fraction: float, file: Path) -> tuple[Array, Array, Array]:
    """Indices of the training, validation and test part, in random order, with the share of each class in each part.

    Args:
        labels: the numbers of the classes [samples].
        val_fraction, test_fraction: the shares of all samples that validate and test.
        file: the file that the samples are from, for messages.

    Raises:
        ValueError: a part smaller than the number of classes.
    """
    remaining, test = drawn_part(
        np.arange(len(labels)), labels, test_fraction, "data.test_fraction", str(file), RANDOM_STATE
    )
    train, val = drawn_part(remaining, labels, val_fraction, "data.val_fraction", str(file), RANDOM_STATE)
    return train, val, test
