"""The first pages of docs show plans, messages and choices of the command line: they are those that a user gets."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import GMP, RigL, methods
from sparse_callbacks.testing.networks import Classifier

ROOT = Path(__file__).parents[1]
TRAINER, START, COMMAND_LINE = ((ROOT / f"docs/{name}.md").read_text() for name in ("trainer", "start", "command_line"))


def section(page: str, heading: str) -> str:
    """The text of a page between a heading and the next one of its level."""
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


SHOWN = re.findall(r"^\| `([^`]+)`", section(TRAINER, "Common mistakes"), re.MULTILINE)


class Monitored(Classifier):
    """Logs the metric that a checkpoint of the page monitors."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("val_loss", loss)
        return loss


class LBFGSClassifier(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


def module(kind: type[Classifier] = Classifier, norm: bool = False) -> Classifier:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(64)] if norm else []
    return kind(nn.Sequential(nn.Linear(32, 64), *between, nn.ReLU(), nn.Linear(64, 4)))


def fit(*callbacks: pl.Callback, of: Classifier | None = None, path: str | None = None, epochs: int = 5) -> pl.Trainer:
    """A run of two steps an epoch."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 32), torch.randint(0, 4, (64,))), batch_size=32)
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=keeps,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module() if of is None else of, data, ckpt_path=path)
    return trainer


def reparametrised() -> None:
    mine = module()
    for layer in (mine.net[0], mine.net[2]):
        nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    fit(RigL(0.9), of=mine)


def other_arguments() -> None:
    fit(RigL(0.9), epochs=1).save_checkpoint("sparse.ckpt")
    fit(RigL(0.8), path="sparse.ckpt")


def dense_checkpoint() -> None:
    fit(epochs=1).save_checkpoint("dense.ckpt")
    fit(RigL(0.9), path="dense.ckpt")


def trained_before() -> None:
    mine = module(norm=True)
    fit(of=mine, epochs=1)
    fit(RigL(0.5, every=2), of=mine)


def ends_early() -> None:
    fit(GMP("linear(0, 0.9)", every=1, start=0, stop=15))


def loaded_since() -> None:
    mine, method = module(), RigL(0.9, every=2)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    fit(method, of=mine)
    mine.load_state_dict(before)
    method.measured_sparsity()


MISTAKES: list[Callable[[], object]] = [
    lambda: fit(RigL(0.9, include=["fc*"])),
    reparametrised,
    lambda: fit(methods.RigL(0.9)),  # type: ignore[arg-type]
    other_arguments,
    dense_checkpoint,
    trained_before,
    lambda: fit(GMP(0.9, every=1), ModelCheckpoint("kept", monitor="val_loss"), of=module(Monitored)),
    ends_early,
    lambda: fit(RigL(0.9, every=2), GMP(0.9, every=2)),
    loaded_since,
    lambda: fit(RigL(0.9), of=module(LBFGSClassifier)),
]


@contextmanager
def heard() -> Iterator[list[str]]:
    """The texts of errors and warnings within the context."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        except (ValueError, TypeError, AttributeError) as error:
            texts.append(str(error))
    texts += [str(warning.message) for warning in caught]


@pytest.mark.parametrize("place", range(len(SHOWN)), ids=[text[:40] for text in SHOWN])
def test_a_mistake_gets_the_message_that_the_page_shows(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(SHOWN) == len(MISTAKES)
    with heard() as texts:
        MISTAKES[place]()
    wanted = ".*".join(re.escape(part.strip()) for part in SHOWN[place].split("..."))
    assert any(re.search(wanted, text, re.DOTALL) for text in texts), texts


def test_the_plan_that_is_explained_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    block, shown = re.search(r"```python\n(from torch import nn.*?)```\n\n```\n(.*?)```", TRAINER, re.DOTALL).groups()  # type: ignore[union-attr]
    exec(compile(block, "trainer.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == shown.splitlines()


def test_the_first_run_shows_its_plan_and_what_it_explains() -> None:
    layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    output = re.findall(r"```\n(.*?)```", section(START, "Install it, train a network"), re.DOTALL)[1]
    assert str(RigL(0.9).plan(nn.ModuleDict({"model": nn.Sequential(*layers)}))) in output
    explained = re.findall(
        r"`([^`]+)`", " ".join(re.findall(r"^\| (.*?) \|", section(START, "What the lines mean"), re.M))
    )
    assert len(explained) > 8
    assert [words for words in explained if words.removesuffix(" ...").removesuffix("...").strip() not in output] == []


def first_cells(text: str) -> list[str]:
    """Everything in code in the first cell of each row."""
    return [
        name for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", cell)
    ]


@pytest.mark.parametrize("group", ["method", "schedule", "model", "data", "optim", "trainer", "logger"])
def test_a_group_is_shown_with_all_of_its_choices(group: str) -> None:
    row = re.search(rf"^\| `{group}` \|.*\| ([^|]*) \|$", COMMAND_LINE, re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) == {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}


def test_every_preset_and_every_key_of_the_root_is_shown() -> None:
    presets = first_cells(section(COMMAND_LINE, "Presets"))
    assert sorted(presets) == sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml"))
    keys = [name.partition("=")[0] for name in first_cells(section(COMMAND_LINE, "Keys of the root"))]
    root = OmegaConf.load(ROOT / "conf/train.yaml")
    assert sorted(keys) == sorted(str(key) for key in {*root} - {"defaults", "method", "data", "hydra"})


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200
