"""Features and labels from .mat, .npz and .csv files, and from the UCI files of Madelon."""

import csv
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def read(file: Path, features: str, labels: str | int | None, header: bool) -> tuple[Array, Array]:
    """Finite features [n, d] and labels [n] of a file; arguments and errors as in `tabular`."""
    suffix = file.suffix.lower()
    if suffix == ".csv":
        return checked(*_read_csv(file, -1 if labels is None else labels, header), file)
    if suffix not in (".mat", ".npz"):
        raise ValueError(f"data.path={file} is of no known kind. Give a file that ends in .mat, .npz or .csv.")
    arrays = _mat_arrays(file) if suffix == ".mat" else _npz_arrays(file)
    table = _chosen(arrays, features, "features", file)
    return checked(table, _chosen(arrays, "Y" if labels is None else labels, "labels", file), file)


def read_uci(folder: Path, part: str) -> tuple[Array, Array]:
    """Features [n, d] and labels [n] of a part (train or valid) of Madelon.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: something that is no number, or files that do not fit each other.
    """
    data, labels = (folder / f"madelon_{part}.{kind}" for kind in ("data", "labels"))
    for file in (data, labels):
        if not file.is_file():
            raise FileNotFoundError(
                f"data=madelon: {file.absolute()} is not there. Put the UCI files (madelon_train.data, madelon_train.labels, "
                "madelon_valid.data, madelon_valid.labels) into FOLDER/madelon and give data.root=FOLDER."
            )
    try:
        table, column = np.loadtxt(data, ndmin=2), np.loadtxt(labels, ndmin=1)
    except ValueError as error:
        raise ValueError(f"{data} and its labels must hold numbers, the same count in every line: {error}. Fetch them anew.") from None
    return checked(table, column, data)


def checked(table: Array, column: Array, file: Path) -> tuple[Array, Array]:
    """Features [n, d] and labels [n], after they were found to be such.

    Raises:
        ValueError: they are not.
    """
    if table.dtype.kind not in "biuf":
        raise ValueError(f"{file}: the features are of type {table.dtype}, not real numbers. Encode them as numbers.")
    if table.ndim != 2 or 0 in table.shape or len(table) != column.size:
        raise ValueError(
            f"{file}: features of shape {table.shape} do not fit {column.size} labels. "
            "They must be [samples, features] with one label for each sample: check data.features and data.labels."
        )
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(table.astype(np.float32)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{file}: {int(bad.sum())} samples have features that are no finite numbers (NaN, or infinite in float32), the first is row "
            f"{first(bad)}. Fill them in, or remove these rows."
        )
    column = column.reshape(-1)
    if column.dtype.kind == "O":  # a cell array of words: each an array of its own, empty where there is none
        column = np.array(["" if np.size(cell) == 0 else str(np.squeeze(cell)) for cell in column])
    return table, np.char.strip(column) if column.dtype.kind == "U" else column


def first(rows: Any) -> int:
    """Number of the first of the rows (bool [n]) that is True, from 1; a header does not count."""
    return int(rows.argmax()) + 1


def _chosen(arrays: dict[str, Array], name: str | int, argument: str, file: Path) -> Array:
    if name not in arrays:
        there = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items()) or "none"
        raise ValueError(f"data.{argument}={name!r} is no array of {file}. Arrays there: {there}. Give data.{argument}=NAME.")
    return arrays[str(name)]


def _mat_arrays(file: Path) -> dict[str, Array]:
    from scipy.io import loadmat, matlab  # type: ignore[import-untyped]

    try:
        found = loadmat(file)
    except (NotImplementedError, ValueError, TypeError, OSError, matlab.MatReadError) as error:
        raise ValueError(
            f"{file} cannot be read as a MATLAB file ({error}). One of version 7.3 is HDF5: save it with -v7, or as .npz."
        ) from None
    dense = {key: value.toarray() if hasattr(value, "toarray") else value for key, value in found.items()}
    return {key: value for key, value in dense.items() if isinstance(value, np.ndarray)}


def _npz_arrays(file: Path) -> dict[str, Array]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} cannot be read as a .npz file ({error}). Write it with np.savez(FILE, X=..., Y=...), without arrays of objects."
        ) from None


def _read_csv(file: Path, labels: str | int, header: bool) -> tuple[Array, Array]:
    """Features float64 [n, d] and labels [n]: numbers where all are, else words. Line by line, so that no text piles up."""
    rows = _rows(file)
    _, head = next(rows, (0, []))
    names = [name.strip() for name in head] if header else None
    if not head:
        raise ValueError(f"{file} is empty. Give a file with a line for each sample.")
    position, numbers, words = _position(labels, names, len(head), file), array("d"), []
    if names and _number([n for i, n in enumerate(names) if i != position % len(head)]) is not None:
        raise ValueError(f"{file}: the first line has numbers and no names of columns. Give data.header=false, or it would be lost.")
    for line, row in rows if header else _rows(file):
        words.append(row.pop(position))
        try:
            numbers.extend(map(float, row))
        except ValueError as error:
            raise ValueError(
                f"{file}, line {line}: a feature is no number ({error}). Encode it as a number; give data.header=true where the first "
                "line has names, and the column of the labels in data.labels."
            ) from None
    column = _number(words)
    return np.array(numbers).reshape(len(words), len(head) - 1), np.array(words, dtype=np.str_) if column is None else column


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and values of each line that is not empty."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        width = 0
        try:
            for row in filter(None, reader):
                width = width or len(row)
                if len(row) != width:
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(row)} values, and the first line has {width}. Give every line the same "
                        "columns."
                    )
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text ({error}). Save it as UTF-8.") from None


def _number(words: list[str]) -> Array | None:
    """The words as float64, or None where one is no number."""
    try:
        return np.array([float(word) for word in words])
    except ValueError:
        return None


def _position(labels: str | int, names: list[str] | None, width: int, file: Path) -> int:
    """Index of the column of the labels."""
    if width > 1 and isinstance(labels, int) and -width <= labels < width:
        return labels
    if width > 1 and names and names.count(str(labels)) == 1:
        return names.index(str(labels))
    columns = ", ".join(names) if names else f"{width}, counted from 0"
    raise ValueError(
        f"data.labels={labels!r} names no single column beside features in {file}. Its columns, separated by commas: {columns}. "
        "Give an index, or with data.header=true a name; columns are separated by commas, not by semicolons or tabs."
    )
