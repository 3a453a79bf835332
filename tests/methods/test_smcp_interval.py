"""SMCP's interval between solves: 20,480 training images, over ranks and accumulated batches."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.smcp import conv_net
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from sparse_callbacks import SMCP, methods, sparsify
from sparse_callbacks.core import sparse_run
from sparse_callbacks.core.state_layout import inventory
from sparse_callbacks.lightning import accumulation
from sparse_callbacks.methods.smcp.smcp import CORRECTED
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DATA = TensorDataset(torch.randn(64, 2, 5, 5), torch.randint(4, (64,)))
TIMES: dict[str, Any] = {"start": 0, "stop": 100_000, "round_to": 4, "print_plan": False}


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield DATA[0]


def interval(loader: Any, **options: Any) -> int:
    method = SMCP(0.5, **TIMES)
    module = Classifier(conv_net())
    module.example_input_array = torch.zeros(1, 2, 5, 5)
    fit(module, method, loader=loader, max_steps=1, **options)
    return method.times.every


@pytest.mark.parametrize(
    ("size", "accumulated", "expected"),
    [(16, 1, 1280), (16, 4, 320), (64, 1, 320), (48, 1, 427)],
)
def test_an_interval_sees_as_many_images_as_the_published_one(size: int, accumulated: int, expected: int) -> None:
    assert math.ceil(80 * 256 / (size * accumulated)) == expected
    assert interval(DataLoader(DATA, batch_size=size), accumulate_grad_batches=accumulated) == expected


def test_other_loaders_with_a_batch_size() -> None:
    batches = BatchSampler(RandomSampler(DATA), batch_size=32, drop_last=False)
    assert interval(DataLoader(DATA, batch_sampler=batches)) == 640
    assert interval(DataLoader(Endless(), batch_size=32)) == 640


def test_eighty_steps_where_the_batch_size_is_unknown() -> None:
    assert interval(Batches()) == 80
    assert interval(DataLoader(TensorDataset(*Batches().all(1)[0]), batch_size=None, collate_fn=by_one)) == 80


def by_one(sample: Any) -> Any:
    return sample[0][None], sample[1][None]


def test_a_factor_that_a_scheduler_changes_counts_by_its_mean() -> None:
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 1, 2: 3})
    method, module = SMCP(0.5, **TIMES), Classifier(conv_net())
    fit(module, scheduler, method, loader=DataLoader(DATA, batch_size=16), max_epochs=4, limit_train_batches=3)
    assert method.times.every == 80 * 256 // (16 * 2)


def test_the_images_of_all_devices_count() -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=4, strategy="ddp", num_nodes=2, accumulate_grad_batches=3, max_epochs=2, logger=False
    )
    trainer.fit_loop._combined_loader = pl.utilities.CombinedLoader(DataLoader(DATA, batch_size=16))
    assert accumulation.samples_of_step(trainer) == 16 * 3 * 4 * 2


@pytest.mark.parametrize(("processes", "epoch", "expected"), [(1, None, 1280), (4, None, 320), (2, 2, 320)])
def test_in_a_loop(processes: int, epoch: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four batches of 16 images in an epoch; where it has two optimizer steps, two batches are accumulated."""
    monkeypatch.setattr(sparse_run, "world_size", lambda: processes)
    net = conv_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = methods.SMCP(0.5, **TIMES)
    with sparsify(method, net, optimizer, steps=100_000, epoch=epoch, data=DataLoader(DATA, batch_size=16)):
        assert method.times.every == expected


def test_a_loop_that_gives_no_loader_has_eighty_steps() -> None:
    net = conv_net()
    net.example_input_array = torch.zeros(1, 2, 5, 5)
    method = methods.SMCP(0.5, **TIMES)
    with sparsify(method, net, torch.optim.SGD(net.parameters(), lr=0.1), steps=100_000):
        assert method.times.every == 80


def test_a_run_that_was_saved_by_the_old_rule_keeps_eighty_steps() -> None:
    """As version 0.1 saved it: nothing says that scores are corrected."""

    def run(state: Any = None) -> tuple[Any, Any]:
        net = conv_net()
        method = methods.SMCP(0.5, **TIMES)
        loader = DataLoader(DATA, batch_size=16)
        with sparsify(
            method, net, torch.optim.SGD(net.parameters(), lr=0.1), steps=100_000, data=loader, state=state
        ) as going:
            return method.times.every, going.state_dict()

    every, state = run()
    assert (every, run(state)[0]) == (1280, 1280)
    del state["aux"][CORRECTED]
    assert run({**state, **inventory(state)})[0] == 80
