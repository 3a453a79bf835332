"""docs/trainer.md shows messages of the package, and a plan: they are those that a user gets."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import GMP, RigL, methods
from sparse_callbacks.testing.networks import Classifier

PAGE = (Path(__file__).parents[1] / "docs/trainer.md").read_text()
SHOWN = re.findall(r"^\| `([^`]+)`", PAGE[PAGE.index("## Common mistakes") :], re.MULTILINE)


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


def test_the_plan_that_is_shown_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    block, shown = re.search(r"```python\n(from torch import nn.*?)```\n\n```\n(.*?)```", PAGE, re.DOTALL).groups()  # type: ignore[union-attr]
    exec(compile(block, "trainer.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == shown.splitlines()
