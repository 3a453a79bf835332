"""Scores are computed on the same batches each time, drawn once, and training goes on as if nothing had been computed."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from sparse_callbacks import EarlyCroP, PruneAtStart, Static, methods, sparsify
from sparse_callbacks.core.given_batches import iterated_apart
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.runs import fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:few inputs are left", "ignore:.*does not have many workers", "ignore:.*are not the same when"
)


class Noisy(Dataset[Any]):
    """Samples with noise from two of the generators, which counts how often it is read."""

    def __init__(self, noisy: bool = True) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x, self.noisy, self.reads = torch.randn(40, 6, generator=draw), noisy, 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        noise = torch.randn(6) * 0.1 + random.random() * 0.1 if self.noisy else 0.0
        return self.x[index] + noise, torch.tensor(index % 3)


def loader(generator: torch.Generator | None = None, noisy: bool = True, **options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(noisy), batch_size=8, shuffle=True, generator=generator, **options)


class Trained(pl.LightningModule):
    """Dropout, a norm, a buffer that each step moves, and a record of the batches that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 3))
        self.register_buffer("average", torch.zeros(6), persistent=False)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.average.mul_(0.9).add_(batch[0].mean(0))
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        if self.training:
            self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def trained(callback: pl.Callback, data: Any) -> Trained:
    module = Trained()
    torch.manual_seed(5)
    random.seed(5)
    fit(module, callback, loader=data, max_epochs=3)
    return module


@pytest.mark.parametrize("own", [False, True], ids=["global generator", "generator of its own"])
@pytest.mark.parametrize("given", [False, True], ids=["drawn", "the loader itself"])
@pytest.mark.parametrize("score", ["snip", "crop", "synflow"])
def test_a_run_goes_on_as_one_whose_masks_were_given(score: str, given: bool, own: bool) -> None:
    def data() -> DataLoader[Any]:
        return loader(torch.Generator().manual_seed(9) if own else None)

    mine = data()
    batches = {"batches": mine} if given and score != "synflow" else {}
    callback = PruneAtStart(0.8, score=score, rounds=2, print_plan=False, **batches)
    module = trained(callback, mine)
    masks = {name: mask.float() for name, mask in callback.masks.items()}
    other = trained(Static(initial_mask=masks, print_plan=False), data())
    assert module.seen == other.seen
    assert differences(module.state_dict(), other.state_dict()) == []
    assert torch.equal(module.average, other.average)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "the loader itself"])
def test_a_later_pruning_is_tried_without_a_trace(given: bool) -> None:
    mine = loader(torch.Generator().manual_seed(9))
    callback = EarlyCroP(0.8, when=7, print_plan=False, **({"batches": mine} if given else {}))
    found, dense = trained(callback, mine), trained(pl.Callback(), loader(torch.Generator().manual_seed(9)))
    assert found.seen[:7] == dense.seen[:7]
    assert callback.updates == 1


# ---------------------------------------------------------------------- the batches


def scored(score: str, **options: Any) -> list[float]:
    """The sums of the batches, in the order in which a loss was computed on them."""
    seen: list[float] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        seen.append(float(batch[0].sum()))
        return functional.cross_entropy(module(batch[0]), batch[1])

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    data = options.pop("data", None)
    method = methods.PruneAtStart(0.8, score=score, loss=loss, print_plan=False, **options)
    sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 4, data=data).close()
    return seen


def test_a_loader_gives_the_same_batches_in_every_pass() -> None:
    generator = torch.Generator().manual_seed(4)
    state = generator.get_state()
    seen = scored("crop", batches=loader(generator), rounds=2)
    assert len(seen) == 20
    assert seen[:5] * 4 == seen
    assert torch.equal(generator.get_state(), state)


def test_a_number_of_batches_is_drawn_once() -> None:
    data = loader(noisy=False)
    seen = scored("crop", batches=2, rounds=3, data=data)
    assert seen[:2] * 6 == seen
    assert data.dataset.reads == 16


def test_the_inputs_of_synflow_are_looked_up_once() -> None:
    data = loader(noisy=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    method = methods.PruneAtStart(0.8, score="synflow", rounds=5, print_plan=False)
    sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 4, data=data).close()
    once = data.dataset.reads
    again = methods.PruneAtStart(0.8, score="synflow", rounds=10, print_plan=False)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    sparsify(again, model, torch.optim.SGD(model.parameters(), 0.1), 4, data=data).close()
    assert data.dataset.reads == 2 * once


class Scales(Trained):
    """A hook that writes into the batch."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].mul_(2.0)
        return batch


def test_hooks_may_write_into_a_batch() -> None:
    batch = (torch.randn(8, 6, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3)
    before = batch[0].clone()
    callback = PruneAtStart(0.8, score="crop", rounds=3, batches=[batch], print_plan=False)
    fit(Scales(), callback, loader=loader(), max_steps=1)
    assert torch.equal(batch[0], before)
    other = PruneAtStart(0.8, score="crop", rounds=3, batches=[(before * 2, batch[1])], print_plan=False)
    fit(Trained(), other, loader=loader(), max_steps=1)
    assert differences(dict(callback.masks), dict(other.masks)) == []


def test_lasting_workers_go_on_with_the_training() -> None:
    lasting = loader(torch.Generator().manual_seed(2), noisy=False, num_workers=1, persistent_workers=True)

    def firsts(batches: Iterable[Any]) -> list[float]:
        return [float(x[0, 0]) for x, _ in batches]

    expected = firsts(loader(torch.Generator().manual_seed(2), noisy=False))
    training = iter(lasting)
    found = [float(next(training)[0][0, 0]) for _ in range(2)]
    with iterated_apart(lasting) as apart:
        assert len(firsts(apart)) == 5
    assert found + firsts(training) == expected
