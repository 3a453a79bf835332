"""Tables of numbers from files: what is read and refused, and how it is split and scaled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from scipy import io, sparse
from support.tables import table, whole, write_csv

from sparse_callbacks.tasks.data import tabular

CONF = Path(__file__).parents[2] / "conf"
Compose = Callable[..., DictConfig]
Run = Callable[..., dict[str, float]]


# ---------------------------------------------------------------------- Madelon


def test_madelon_is_split_and_scaled_as_published(madelon_folder: Path) -> None:
    from sklearn.model_selection import train_test_split

    found = tabular.madelon(root=str(madelon_folder))
    rows = np.loadtxt(madelon_folder / "madelon/madelon_train.data")
    answers = np.loadtxt(madelon_folder / "madelon/madelon_train.labels")
    train, val, train_y, val_y = train_test_split(rows, answers, test_size=0.1, random_state=42)
    mean, std = train.mean(0), train.std(0)
    assert [len(part) for part in (found.train, found.val, found.test)] == [54, 6, 20]
    for part, expected in (
        (found.train, train),
        (found.val, val),
        (found.test, np.loadtxt(madelon_folder / "madelon/madelon_valid.data")),
    ):
        assert part.inputs.dtype == torch.float32
        np.testing.assert_allclose(
            part.inputs, (expected - mean) / std, rtol=1e-5, atol=1e-6
        )  # float32 against float64
    assert torch.equal(found.train.labels, torch.tensor((train_y + 1) / 2).long())
    assert torch.equal(found.val.labels, torch.tensor((val_y + 1) / 2).long())
    assert found.test.labels.tolist() == [1, 0, 0, 0] * 5
    assert (found.input_shape, found.num_classes) == ((5,), 2)


def test_madelon_is_the_same_for_every_seed_and_ordered_by_it(madelon_folder: Path) -> None:
    def first_epoch(**options: Any) -> torch.Tensor:
        return torch.cat(
            [rows for rows, _ in tabular.madelon(root=str(madelon_folder), batch_size=8, **options).train_dataloader()]
        )

    fixed = first_epoch(shuffle=False)
    split = tabular.madelon(root=str(madelon_folder), seed=7).train.inputs
    assert torch.equal(fixed, split)
    assert torch.equal(first_epoch(shuffle=False, seed=7), fixed)
    assert not torch.equal(first_epoch(seed=7), first_epoch(seed=8))
    assert not torch.equal(first_epoch(), fixed)


@pytest.mark.parametrize(
    "name", ["madelon_train.data", "madelon_train.labels", "madelon_valid.data", "madelon_valid.labels"]
)
def test_madelon_without_a_file(madelon_folder: Path, name: str) -> None:
    (madelon_folder / "madelon" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"data=madelon: \S*{name} is not there.*data.root=FOLDER"):
        tabular.madelon(root=str(madelon_folder))


def test_madelon_with_a_word(madelon_folder: Path) -> None:
    (madelon_folder / "madelon/madelon_valid.data").write_text("1 2 x 4 5\n")
    with pytest.raises(
        ValueError, match=r"madelon_valid.data and its labels must hold numbers, the same count in every line"
    ):
        tabular.madelon(root=str(madelon_folder))


def test_madelon_with_a_label_too_few(madelon_folder: Path) -> None:
    (madelon_folder / "madelon/madelon_train.labels").write_text("1\n" * 59)
    with pytest.raises(ValueError, match=r"madelon_train.data: features of shape \(60, 5\) do not fit 59 labels"):
        tabular.madelon(root=str(madelon_folder))


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", ["mat", "npz", "csv"])
def test_every_kind_of_file_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    features, labels = table()
    file = tmp_path / f"set.{kind}"
    if kind == "mat":
        io.savemat(file, {"X": features, "Y": labels[:, None].astype(np.uint8)})
    elif kind == "npz":
        np.savez(file, X=features, Y=labels)
    else:
        write_csv(file, features, labels, "a,b,c,d,class")
    found = tabular.tabular(f"set.{kind}", root=str(tmp_path), scaler="none")
    assert torch.equal(found.train.inputs, tabular.tabular(str(file), scaler="none", seed=3).train.inputs)
    inputs, numbers = whole(found)
    order = features[:, 0].argsort()
    assert torch.equal(inputs, torch.tensor(features[order]).float())
    assert torch.equal(numbers, torch.tensor(labels[order] - 1))
    assert (found.num_classes, found.input_shape) == (3, (4,))


def test_arrays_of_other_names_sparse_features_and_words_as_labels(tmp_path: Path) -> None:
    features = np.random.default_rng(0).integers(0, 3, (30, 6))
    words = np.array(["oak", "ash"] * 15)
    cells = np.empty((30, 1), dtype=object)
    cells[:, 0] = words
    io.savemat(tmp_path / "a.mat", {"data": sparse.csc_matrix(features.astype(float)), "kind": cells})
    np.savez(tmp_path / "a.npz", data=features, kind=words)
    for name in ("a.mat", "a.npz"):
        found = tabular.tabular(name, root=str(tmp_path), features="data", labels="kind", scaler="none")
        inputs, numbers = whole(found)
        assert torch.equal(inputs.sum(0), torch.tensor(features.sum(0)).float())
        assert numbers.sum() == 15  # the oaks, behind ash in sorted order
        assert inputs[numbers == 1].sum() == features[0::2].sum()


@pytest.mark.parametrize(
    ("head", "position", "labels", "header"),
    [
        ("kind,a,b,c,d", 0, "kind", True),
        ("kind,a,b,c,d", 0, 0, True),
        ("a,b,kind,c,d", 2, -3, True),
        (None, 2, 2, False),
        (None, -1, None, False),
    ],
)
def test_the_column_of_the_labels(
    tmp_path: Path, head: str | None, position: int, labels: str | int | None, header: bool
) -> None:
    features, _ = table()
    words = np.array(["b", "a", "c"] * 20)
    write_csv(tmp_path / "a.csv", features, words, head, position)
    inputs, numbers = whole(tabular.tabular("a.csv", root=str(tmp_path), labels=labels, header=header, scaler="none"))
    order = features[:, 0].argsort()
    assert torch.equal(inputs, torch.tensor(features[order]).float())
    assert ["abc"[n] for n in numbers] == words[order].tolist()


def test_csv_labels_that_are_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    features, _ = table()
    words = np.array(["10", "2", "2.0"] * 20)
    write_csv(tmp_path / "a.csv", features, words, "a,b,c,d,y")
    _, numbers = whole(tabular.tabular("a.csv", root=str(tmp_path), scaler="none"))
    assert torch.bincount(numbers).tolist() == [40, 20]


def test_a_byte_order_mark_and_empty_lines_are_not_data(tmp_path: Path) -> None:
    features, labels = table()
    file = write_csv(tmp_path / "a.csv", features, labels, "y,a,b,c,d", 0)
    file.write_text("\ufeff" + file.read_text().replace("\n", "\n\n"))
    found = tabular.tabular("a.csv", root=str(tmp_path), labels="y")
    assert sum(len(part) for part in (found.train, found.val, found.test)) == 60


# ---------------------------------------------------------------------- splits and scalers


def test_parts_have_their_share_of_each_class_in_random_order(tmp_path: Path) -> None:
    features, labels = table(120)
    np.savez(tmp_path / "a.npz", X=features, Y=labels)
    found = tabular.tabular("a.npz", root=str(tmp_path), val_fraction=0.2, test_fraction=0.3)
    for part, each in ((found.train, 20), (found.val, 8), (found.test, 12)):
        assert torch.bincount(part.labels).tolist() == [each] * 3
    assert found.train.labels[:20].unique().numel() == 3
    again = tabular.tabular("a.npz", root=str(tmp_path), val_fraction=0.2, test_fraction=0.3, seed=9)
    assert torch.equal(found.test.inputs, again.test.inputs)


@pytest.mark.parametrize("scaler", ["standard", "minmax", "none"])
def test_the_scaler_knows_the_training_part_only(tmp_path: Path, scaler: str) -> None:
    features, labels = table()
    features = np.hstack([features, np.full((60, 1), 7.0)])  # a constant column
    np.savez(tmp_path / "a.npz", X=features, Y=labels)
    raw = tabular.tabular("a.npz", root=str(tmp_path), scaler="none")
    found = tabular.tabular("a.npz", root=str(tmp_path), scaler=scaler)
    train = raw.train.inputs.double()
    shift, scale = {
        "standard": (train.mean(0), train.std(0, correction=0)),
        "minmax": (train.amin(0), train.amax(0) - train.amin(0)),
        "none": (torch.zeros(5), torch.ones(5)),
    }[scaler]
    scale[-1] = 1.0
    for part, source in ((found.train, raw.train), (found.val, raw.val), (found.test, raw.test)):
        # the scaler saw float64, here the source is float32
        torch.testing.assert_close(part.inputs, ((source.inputs - shift) / scale).float(), rtol=1e-5, atol=1e-5)
    assert scaler == "none" or not found.test.inputs.mean(0).abs().lt(1e-3)[:4].any()


# ---------------------------------------------------------------------- refusals


def refused(tmp_path: Path, message: str, features: Any = None, labels: Any = None, **options: Any) -> None:
    default_features, default_labels = table()
    arrays = {
        "X": default_features if features is None else features,
        "Y": default_labels if labels is None else labels,
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        tabular.tabular("a.npz", root=str(tmp_path), **options)


def test_no_path() -> None:
    with pytest.raises(ValueError, match=r"data=tabular reads the file that you name. Give data.path=FILE"):
        tabular.tabular()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data.path=a.mat is not there \(looked at {tmp_path}/a.mat\)"):
        tabular.tabular("a.mat", root=str(tmp_path))


def test_an_unknown_scaler(tmp_path: Path) -> None:
    refused(tmp_path, r"data.scaler='robust' is not known. Choose one of standard, minmax, none", scaler="robust")


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.2), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2)])
def test_fractions_that_leave_a_part_empty(tmp_path: Path, val: float, test: float) -> None:
    refused(
        tmp_path,
        f"data.val_fraction={val} and data.test_fraction={test} leave one",
        val_fraction=val,
        test_fraction=test,
    )


def test_fractions_that_leave_fewer_samples_than_classes(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"data.val_fraction=0.01 of 60 samples is 1, fewer than the . classes",
        val_fraction=0.01,
    )


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.xlsx is not of a known kind. Give a file that ends in .mat, .npz or .csv"):
        tabular.tabular("a.xlsx", root=str(tmp_path))


@pytest.mark.parametrize("argument", ["features", "labels"])
def test_an_absent_array_lists_those_there(tmp_path: Path, argument: str) -> None:
    listed = r"Arrays there: X \[60, 4\], Y \[60\]. Give data." + argument
    features, labels = table()
    np.savez(tmp_path / "a.npz", X=features, Y=labels)
    with pytest.raises(ValueError, match=rf"data.{argument}='Z' is not an array of \S*a.npz. {listed}"):
        tabular.tabular("a.npz", root=str(tmp_path), **{argument: "Z"})
    io.savemat(tmp_path / "b.mat", {"fea": np.ones((3, 2))})
    with pytest.raises(ValueError, match=r"data.features='X' is not an array of \S*b.mat. Arrays there: fea \[3, 2\]"):
        tabular.tabular("b.mat", root=str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF", b"nonsense " * 40]
)
def test_a_file_that_is_not_a_matlab_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.mat cannot be read as a MATLAB file .*save it with -v7, or as .npz"):
        tabular.tabular("a.mat", root=str(tmp_path))


def test_a_file_that_is_not_an_npz_file(tmp_path: Path) -> None:
    features, _ = table()
    np.save(tmp_path / "array.npy", features)
    np.savez(tmp_path / "objects.npz", X=features, Y=np.array([{}] * 60, dtype=object))
    others = [(tmp_path / name).read_bytes() for name in ("array.npy", "objects.npz")]
    for content in (b"", b"nonsense", b"PK\x03\x04 cut short", *others):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.npz cannot be read as a .npz file .*Write it with np.savez"):
            tabular.tabular("a.npz", root=str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_features_that_are_not_finite(tmp_path: Path, value: float) -> None:
    features, _ = table()
    features[[3, 8], 1] = value
    refused(
        tmp_path, r"2 samples have features that are not finite numbers .*the first is row 4. Fill them in", features
    )


@pytest.mark.parametrize("features", [np.full((60, 4), "red"), np.ones((60, 4), dtype=complex)])
def test_features_that_are_not_numbers(tmp_path: Path, features: np.ndarray) -> None:
    refused(tmp_path, rf"the features are of type {features.dtype}, not real numbers", features)


@pytest.mark.parametrize("shape", [(4, 60), (60, 2, 2), (60,), (60, 0)])
def test_features_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refused(tmp_path, r"do not fit 60 labels. They must be \[samples, features\]", np.ones(shape))


@pytest.mark.parametrize("labels", [[np.nan] * 2 + [1.0] * 58, ["", " "] + ["a", "b"] * 29])
def test_samples_without_a_label(tmp_path: Path, labels: list[Any]) -> None:
    refused(tmp_path, r"2 samples have no label, the first is row 1. Remove these rows", labels=np.array(labels))


def test_an_empty_cell_is_not_a_label(tmp_path: Path) -> None:
    features, _ = table()
    cells = np.empty((60, 1), dtype=object)
    cells[:, 0] = ["a", "b"] * 30
    cells[5, 0] = np.array([])
    io.savemat(tmp_path / "a.mat", {"X": features, "Y": cells})
    with pytest.raises(ValueError, match=r"1 samples have no label, the first is row 6"):
        tabular.tabular("a.mat", root=str(tmp_path))


def test_a_single_class(tmp_path: Path) -> None:
    refused(tmp_path, r"all labels are 4, and one class needs no network", labels=np.full(60, 4))


def test_a_class_too_small(tmp_path: Path) -> None:
    labels = np.array(["a"] * 58 + ["rare"] * 2)
    refused(
        tmp_path,
        r"class rare of 2 has 2 samples, too few to train, validate and test with: 3 are needed",
        labels=labels,
    )
    np.savez(tmp_path / "b.npz", X=table()[0], Y=np.array(["a"] * 57 + ["rare"] * 3))
    assert tabular.tabular("b.npz", root=str(tmp_path)).train.labels.sum() >= 1


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "a,b\n1,x\n2,y,3\n",
            {},
            r"a.csv is no table: Expected 2 fields in line 3, saw 3. Give every line the same columns",
        ),
        ("a,b\n1,x\nred,y\n", {}, r"a.csv, row 2: a feature is not a number \('red'\)"),
        ("a,b\n1,x\n,y\n", {}, r"a.csv, row 2: a feature is not a number \(''\)"),
        ("a,b\n1,x\n\nnan,y\n", {}, r"a.csv, row 2: a feature is not a number \('nan'\)"),
        ("a,b\n1_0,x\n2,y\n", {}, r"a.csv, row 1: a feature is not a number \('1_0'\)"),
        ("a,b\n\uff11,x\n", {}, r"a.csv, row 1: a feature is not a number"),
        ("a,b\n1,x\n-inf,y\n", {}, r"features that are not finite numbers .*row 2"),
        ("a,b\n1,x\nTrue,y\n", {}, r"a.csv, row 2: a feature is not a number \('True'\)"),
        (
            "a,b,c\n1,2,x\n3,y\n",
            {},
            r"a.csv, row 2: a feature is not a number \('y'\).*give every line the same columns",
        ),
        ("a,b,c\n1,2,x\n3,4\n", {}, r"without a label|label"),
        ('a,b\n1,"x\n2,y\n', {}, r"a.csv is no table: EOF inside string"),
        ("a,b\n1,x\n", {"header": False}, r"a.csv, row 1: a feature is not a number \('a'\).*data.header=true"),
        ("1,2\n3,4\n", {}, r"the first line has numbers and no names of columns. Give data.header=false"),
        ("0.1,0.2,x\n0.3,0.4,y\n", {}, r"the first line has numbers and no names of columns. Give data.header=false"),
        (
            "a,b\n1,x\n",
            {"labels": "c"},
            r"data.labels='c' does not name a single column beside features in \S*a.csv. .*: a, b. Give",
        ),
        ("a,a,b\n1,1,x\n", {"labels": "a"}, r"data.labels='a' does not name a single column"),
        ("a,b\n1,x\n", {"labels": 2}, r"data.labels=2 does not name a single column"),
        (
            "1,x\n",
            {"labels": "c", "header": False},
            r"data.labels='c' does not name a single column .*: 2, counted from 0",
        ),
        ("a;b\n1;x\n", {}, r"does not name a single column beside features .*separated by commas: a;b"),
        ("", {}, r"a.csv is empty"),
        ("a,b\n", {}, r"features of shape \(0, 1\) do not fit 0 labels"),
    ],
)
def test_csv_files_that_are_not_a_table(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tabular.tabular("a.csv", root=str(tmp_path), **options)
