"""Reads features and labels from .mat, .npz and .csv files, and from the UCI files of Madelon."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# what a cell of a .csv file must be, beside words for infinity, which are refused later
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)


def read(file: Path, features: str, labels: str | int | None, header: bool) -> tuple[Array, Array]:
    """Finite features [n, d] and labels [n] of a file; arguments and errors are those of `tabular`."""
    suffix = file.suffix.lower()
    if file.is_dir():
        raise ValueError(f"data.path={file} is a folder. Give a file that ends in .mat, .npz or .csv.")
    if suffix == ".csv":
        table, column = _read_csv(file, -1 if labels is None else labels, header)
        return checked(table, column, file)
    if suffix == ".mat":
        arrays = _mat_arrays(file)
    elif suffix == ".npz":
        arrays = _npz_arrays(file)
    else:
        raise ValueError(f"data.path={file} is not of a known kind. Give a file that ends in .mat, .npz or .csv.")
    table = _chosen(arrays, features, "features", file)
    column = _chosen(arrays, "Y" if labels is None else labels, "labels", file)
    return checked(table, column, file)


def read_uci(folder: Path, part: str) -> tuple[Array, Array]:
    """Features [n, d] and labels [n] of one part of Madelon.

    Args:
        folder: the folder of the UCI files.
        part: train or valid.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: an entry that is not a number, or files that do not fit each other.
    """
    data, labels = folder / f"madelon_{part}.data", folder / f"madelon_{part}.labels"
    for file in (data, labels):
        if not file.is_file():
            raise FileNotFoundError(
                f"data=madelon: {file.absolute()} is not there. Put the UCI files (madelon_train.data, "
                "madelon_train.labels, madelon_valid.data, madelon_valid.labels) into FOLDER/madelon and give "
                "data.root=FOLDER."
            )
    try:
        table, column = np.loadtxt(data, ndmin=2), np.loadtxt(labels, ndmin=1)
    except ValueError as error:
        raise ValueError(
            f"{data} and its labels must hold numbers, the same count in every line: {error}. Download them again."
        ) from None
    return checked(table, column, data)


def checked(table: Array, column: Array, file: Path) -> tuple[Array, Array]:
    """The features and labels themselves, if they can be trained with.

    Args:
        table: what should be features [n, d].
        column: what should be n labels, of any shape.
        file: the file that they are from, for messages.

    Returns:
        The features [n, d] and the labels [n]; words are without spaces around them.

    Raises:
        ValueError: features that are not finite real numbers, or shapes that do not fit each other.
    """
    # bool, signed and unsigned integers, and floats
    if table.dtype.kind not in "biuf":
        raise ValueError(f"{file}: the features are of type {table.dtype}, not real numbers. Encode them as numbers.")
    if table.ndim != 2 or 0 in table.shape or len(table) != column.size:
        raise ValueError(
            f"{file}: features of shape {table.shape} do not fit {column.size} labels. "
            "They must be [samples, features] with one label for each sample: check data.features and data.labels."
        )
    # judged in float32, which the network is trained in: 1e300 is finite in float64 alone
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(table.astype(np.float32)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{file}: {int(bad.sum())} samples have features that are not finite numbers (NaN, or infinite in "
            f"float32), the first is row {first_row(bad)}. Fill them in, or remove these rows."
        )
    # beside them words and objects, the cells of MATLAB
    if column.dtype.kind not in "biufUSO" or (column.dtype.kind == "f" and np.isinf(column).any()):
        raise ValueError(f"{file}: the labels are of type {column.dtype}, or infinite. Give whole numbers or words.")
    column = column.reshape(-1)
    if column.dtype.kind == "O":
        # a cell array of MATLAB: each cell is an array of its own, and an empty one is a missing label
        column = np.array(["" if np.size(cell) == 0 else str(np.squeeze(cell)) for cell in column])
    if column.dtype.kind == "U":
        column = np.char.strip(column)
    return table, column


def first_row(marked: Any) -> int:
    """The number of the first row that is marked (bool [n]), counted from 1 without a header."""
    return int(marked.argmax()) + 1


def _chosen(arrays: dict[str, Array], name: str | int, argument: str, file: Path) -> Array:
    """The array of that name; an error names the arrays there and the argument that chooses one."""
    if name not in arrays:
        there = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items()) or "none"
        raise ValueError(
            f"data.{argument}={name!r} is not an array of {file}. Arrays there: {there}. Give data.{argument}=NAME."
        )
    return arrays[str(name)]


def _mat_arrays(file: Path) -> dict[str, Array]:
    """The arrays of a MATLAB file by name."""
    # only needed for these files, and slow to import
    from scipy.io import loadmat  # type: ignore[import-untyped]

    try:
        found = loadmat(file)
        # sparse matrices are made dense; strings and lists that describe the file are left out
        dense = {key: value.toarray() if hasattr(value, "toarray") else value for key, value in found.items()}
    except Exception as error:  # whatever the reader finds in a file that was cut off, or that states an absurd size
        raise ValueError(
            f"{file} cannot be read as a MATLAB file ({type(error).__name__}: {error}). "
            "A file of version 7.3 is HDF5: save it with -v7, or as .npz."
        ) from None
    return {key: value for key, value in dense.items() if isinstance(value, np.ndarray)}


def _npz_arrays(file: Path) -> dict[str, Array]:
    """The arrays of a .npz file by name."""
    try:
        # arrays of objects are pickles, which could run any code
        with np.load(file, allow_pickle=False) as archive:
            # a zip of another kind has entries that numpy gives as bytes
            return {key: value for key in archive.files if isinstance(value := archive[key], np.ndarray)}
    except (
        Exception
    ) as error:  # a file that was cut off raises errors of zipfile, zlib and numpy, an absurd size one of memory
        raise ValueError(
            f"{file} cannot be read as a .npz file ({type(error).__name__}: {error}). "
            "Write it with np.savez(FILE, X=..., Y=...), without arrays of objects."
        ) from None


def _read_csv(file: Path, labels: str | int, header: bool) -> tuple[Array, Array]:
    """Features [n, d] (float64) and labels [n], which are float64 where all of them are numbers, else words."""
    import pandas

    try:
        head = pandas.read_csv(file, header=None, nrows=1, dtype=str, na_filter=False)
        names = [name.strip() for name in head.iloc[0]] if header else None
        position = _label_position(labels, names, head.shape[1], file)
        if names is not None:
            feature_names = names.copy()
            feature_names.pop(position)
            if _as_numbers(feature_names) is not None:
                raise ValueError(
                    f"{file}: the first line has numbers and no names of columns. "
                    "Give data.header=false, or it would be lost."
                )
        columns = list(range(head.shape[1]))
        types = dict.fromkeys(columns, np.float64) | {columns[position]: str}
        # without na_filter an empty cell is no number, and no NaN
        options = {"names": columns, "header": 0 if header else None, "index_col": False, "na_filter": False}
        try:
            table = pandas.read_csv(file, dtype=types, **options)
        except ValueError as error:
            if isinstance(error, pandas.errors.ParserError | UnicodeDecodeError):
                raise
            words = pandas.read_csv(file, dtype=str, **options).drop(columns=columns[position])
            raise ValueError(_no_number(words, file)) from None
    except pandas.errors.EmptyDataError:
        raise ValueError(f"{file} is empty. Give a file with a line for each sample.") from None
    except pandas.errors.ParserError as error:
        what = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise ValueError(f"{file} is no table: {what}. Give every line the same columns, with commas.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    words = table.pop(columns[position])
    column = _as_numbers(words)
    return table.to_numpy(), np.array(words, dtype=np.str_) if column is None else column


def _no_number(words: Any, file: Path) -> str:
    """What is wrong with features of which one is no number; they are a pandas.DataFrame of words."""
    found = ((row, cell) for row, cells in enumerate(words.itertuples(index=False), 1) for cell in cells)
    row, cell = next(one for one in found if not NUMBER.fullmatch(one[1].strip()))
    return (
        f"{file}, row {row}: a feature is not a number ({cell!r}). Encode it as a number, and give every line the same columns; "
        "give data.header=true where the first line has names, and the column of the labels in data.labels."
    )


def _as_numbers(words: Iterable[str]) -> Array | None:
    """The words as float64, or None where one is not a number."""
    try:
        return np.array([float(word) for word in words])
    except ValueError:
        return None


def _label_position(labels: str | int, names: list[str] | None, width: int, file: Path) -> int:
    """The index of the column of the labels; it may be negative, as indices of lists are."""
    # in a file with a single column nothing would be left for the features
    if width > 1:
        if isinstance(labels, int) and -width <= labels < width:
            return labels
        # a name may also look like a number ("2019"), which arrives as an int that is not an index
        if names and names.count(str(labels)) == 1:
            return names.index(str(labels))
    columns = ", ".join(names) if names else f"{width}, counted from 0"
    raise ValueError(
        f"data.labels={labels!r} does not name a single column beside features in {file}. "
        f"Its columns, separated by commas: {columns}. "
        "Give an index, or with data.header=true a name; columns are separated by commas, not by semicolons or tabs."
    )
