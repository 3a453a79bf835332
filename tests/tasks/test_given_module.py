"""Anybody's LightningDataModule: how it is found, what it is asked, what is refused, and whole runs on it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_callbacks.tasks import plain_errors
from sparse_callbacks.tasks.classifier import cross_entropy
from sparse_callbacks.tasks.data.given_module import describe, given_module

PHOTOS = """
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

class Photos(pl.LightningDataModule):
    def __init__(self, count, batch_size=4, seed=None):
        super().__init__()
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def setup(self, stage):
        torch.rand(1)
        self.data = TensorDataset(torch.rand(self.count, 2, 3, 3), torch.arange(self.count) % 6)

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, self.batch_size)

    test_dataloader = val_dataloader

class Named(Photos):
    num_classes = 6

    def __init__(self, **options):
        super().__init__(count=options.get("count", 24))

class WithoutTest(pl.LightningDataModule):
    def train_dataloader(self):
        return []

class Labelled(Named):
    # of another kind from the batch `late` on
    def __init__(self, kind, late=0):
        super().__init__()
        self.kind, self.late = kind, late

    def train_dataloader(self):
        convert = {"from one": lambda y: y + 1, "numbers": lambda y: y.double(), "short": lambda y: y.int(),
                   "one hot": lambda y: torch.nn.functional.one_hot(y, 6)}[self.kind]
        batches = [(x, y if n < self.late else convert(y)) for n, (x, y) in enumerate(super().train_dataloader())]
        return DataLoader(batches, batch_size=None)

class Several(Named):
    def val_dataloader(self):
        return [super().val_dataloader(), super().val_dataloader()]

class Empty(Named):
    def train_dataloader(self):
        return []

class Words(Named):
    def train_dataloader(self):
        return [{"text": "a"}]
"""
OTHER = """
import lightning.pytorch as pl

class Other(pl.LightningDataModule):
    pass
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules in the current folder, which is not on the path; each test imports them anew."""
    for name, text in (("my_photos", PHOTOS), ("other_photos", OTHER), ("broken_photos", "import nowhere_at_all")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield
    assert sys.path == path
    for name in ("my_photos", "other_photos"):
        sys.modules.pop(name, None)


def test_a_class_of_the_current_folder_is_made_with_its_arguments_and_the_seed() -> None:
    made: Any = given_module("my_photos.Photos", {"count": 12}, seed=3)
    assert (made.count, made.batch_size, made.seed) == (12, 4, 3)
    own: Any = given_module("my_photos.Photos", {"count": 12, "seed": 9}, seed=3)
    assert own.seed == 9
    assert given_module("my_photos.Named", {"count": 6}).count == 6  # type: ignore[attr-defined]


def test_shape_and_classes_are_found_without_a_trace() -> None:
    state = torch.get_rng_state()
    assert describe(given_module("my_photos.Named"), {}) == ((2, 3, 3), 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert describe(given_module("my_photos.Photos", {"count": 12}), {"num_classes": 9}) == ((2, 3, 3), 9)
    # nothing is read where both are given
    assert describe(given_module("my_photos.Words"), {"num_classes": 9, "input_shape": [7]}) == ((7,), 9)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"module": "broken_photos.Photos"},
            r"broken_photos cannot be imported \(ModuleNotFoundError: .*'nowhere_at_all'\). It is looked for in /",
        ),
        (
            {"module": "my_photos.Foto"},
            r"my_photos has no class Foto. Data modules there: Photos, Named, WithoutTest, Labelled, Several, Empty, Words.",
        ),
        ({"module": "my_photos.torch"}, r"my_photos has no class torch."),
        ({"module": "torch.nn.Linear"}, r"torch.nn.Linear is not a pytorch_lightning.LightningDataModule. Derive it"),
        (
            {"module": "other_photos.Other"},
            r"other_photos.Other is not a pytorch_lightning.LightningDataModule. Import pytorch_lightning in place",
        ),
        (
            {"module": "my_photos.WithoutTest"},
            r"WithoutTest has no val_dataloader and no test_dataloader, and a run trains, validates",
        ),
        (
            {"module": "my_photos.Photos", "options": {"cuont": 3}},
            r"data.options.cuont is not an argument of Photos. Did you mean count\?",
        ),
        (
            {"module": "my_photos.Photos"},
            r"data.module=my_photos.Photos: missing a required argument: 'count'. Give what is missing",
        ),
    ],
)
def test_what_cannot_be_made(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, ImportError), match=sentence) as caught:
        given_module(**given)
    assert plain_errors.refusal(caught.value, Path(), []) == str(caught.value)


def test_what_does_not_say_enough() -> None:
    with pytest.raises(
        ValueError, match=r"Photos does not say how many classes there are. Give data.num_classes=NUMBER"
    ):
        describe(given_module("my_photos.Photos", {"count": 12}), {})
    with pytest.raises(
        ValueError, match=r"A training batch of Words is a dict and not \(inputs, labels\), two tensors"
    ):
        describe(given_module("my_photos.Words"), {})
    with pytest.raises(ValueError, match=r"Empty has no training batch: its train_dataloader gives nothing"):
        describe(given_module("my_photos.Empty"), {})


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("from one", "The labels of a batch go from"),
        (
            "numbers",
            "The labels of a batch have shape (4,) and type float64, and the classifier takes numbers of classes",
        ),
        ("short", "The labels of a batch have shape (4,) and type int32, and the classifier takes"),
        ("one hot", "The labels of a batch have shape (4, 6) and type int64, and the classifier takes"),
    ],
)
def test_labels_of_another_kind_are_answered_by_a_sentence(
    kind: str, late: int, sentence: str, composed: Callable[..., Any], tmp_path: Path
) -> None:
    printed = failed_run(
        composed, tmp_path, "data.module=my_photos.Labelled", f"data.options={{kind: {kind}, late: {late}}}"
    )
    assert sentence in printed
    if kind == "from one":
        assert "to 6, and 6 classes have the numbers 0 to 5. Number them from 0, or give data.num_classes=" in printed


def test_labels_that_torch_takes_for_shares_of_classes_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"The labels of a batch have shape \(4, 6\) and type float32"):
        cross_entropy(torch.zeros(4, 6), torch.full((4, 6), 1 / 6), first=True)


def test_several_loaders_are_answered_by_a_sentence(composed: Callable[..., Any], tmp_path: Path) -> None:
    printed = failed_run(composed, tmp_path, "data.module=my_photos.Several")
    assert printed.startswith("The data module has several val loaders, and a run has one val/acc. Return one loader")


def failed_run(composed: Callable[..., Any], folder: Path, *given: str) -> str:
    """The sentence of a run that cannot go on."""
    from train import train

    quiet = ("logger=[]", "report=false", "trainer.enable_progress_bar=false", "method=none", "model.hidden=[4]")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        train(composed("data=module", *given, *quiet, f"output_dir={folder / 'run'}"))
    printed = plain_errors.refusal(caught.value, folder, [])
    assert printed is not None
    return printed


def test_a_whole_run_that_is_slimmed(composed: Callable[..., Any], tmp_path: Path) -> None:
    from train import train

    short = (
        "logger=[]",
        "report=false",
        "trainer.enable_progress_bar=false",
        "trainer.max_epochs=2",
        "model.hidden=[16]",
    )
    given = ("data=module", "data.module=my_photos.Photos", "data.options={count: 24}", "data.num_classes=6")
    smcp = ("method=smcp", "method.round_to=4", "method.start=0", "method.stop=6", "method.every=2", "slim=true")
    metrics = train(composed(*short, *given, *smcp, f"output_dir={tmp_path / 'run'}"))
    assert metrics["slim/test/acc"] == metrics["test/acc"]
    assert metrics["test/acc5"] >= metrics["test/acc"]  # six classes
    assert metrics["steps"] == 12
