"""The loss on a fixed list of batches: the same every time, in eval mode, twice differentiable, and no trace of it."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.calibrated import Tokens
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sparse_callbacks import sparsify
from sparse_callbacks.core.calibration import Calibration, requiring_grad
from sparse_callbacks.core.doctor.first_signals import FirstSignals
from sparse_callbacks.core.loop_host import LoopHost
from sparse_callbacks.core.record.first_batch import FirstBatch
from sparse_callbacks.core.record.samples import LoopSamples
from sparse_callbacks.methods import Static


class Everything(nn.Module):
    """Dropout, a batch norm and attention, for inputs [n, 5, 6]; it notes how it was run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.tokens, self.drop = nn.BatchNorm1d(5), Tokens(), nn.Dropout(0.5)
        self.notes = SimpleNamespace(seen=[], modes=[])  # a list of tensors would be put back

    def forward(self, x: Tensor) -> Tensor:
        self.notes.seen.append(x.detach())
        self.notes.modes.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return self.tokens(self.drop(self.norm(x)))


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def data(count: int = 24) -> TensorDataset:
    draw = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 5, 6, generator=draw), torch.arange(count) % 3)


def host(net: nn.Module, loader: Any) -> LoopHost:
    """The host of a run of a method that has no part in what is tested."""
    run = sparsify(Static(0.0, print_plan=False), net, torch.optim.SGD(net.parameters(), 0.1), steps=10, data=loader)
    run.close()
    return run._host


def gradients(calibration: Calibration, net: nn.Module, **options: Any) -> list[tuple[float, list[Tensor]]]:
    with calibration.losses(**options) as losses:
        return [
            (float(b.loss.detach()), list(torch.autograd.grad(b.loss, [*net.parameters()], allow_unused=True)))
            for b in losses
        ]


# ---------------------------------------------------------------------- which batches


def test_batches_are_drawn_with_the_seed_and_the_same_every_time() -> None:
    net, loader = Everything(), DataLoader(data(), batch_size=4, shuffle=True)
    found = host(net, loader)
    first = gradients(found.calibration(3, loss=loss_of, seed=1), net)
    seen = torch.cat(net.notes.seen[-3:])
    assert len(first) == 3
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 12  # different samples
    assert not torch.equal(seen, data().tensors[0][:12])  # and not the first ones, which may be of one class
    torch.manual_seed(77)
    again = gradients(found.calibration(3, loss=loss_of, seed=1), net)
    assert [a for a, _ in first] == [b for b, _ in again]
    assert torch.equal(torch.cat(net.notes.seen[-3:]), seen)
    gradients(found.calibration(3, loss=loss_of, seed=2), net)
    assert not torch.equal(torch.cat(net.notes.seen[-3:]), seen)


def test_given_batches_are_taken_as_they_are() -> None:
    net, (x, y) = Everything(), data().tensors
    given = [(x[:4], y[:4]), (x[4:6], y[4:6])]
    with host(net, None).calibration(given, loss=loss_of).losses() as losses:
        assert [b.samples for b in losses] == [4, 2]
    assert torch.equal(torch.cat(net.notes.seen), x[:6])
    with host(net, None).calibration(given, loss=loss_of).losses(limit=1) as losses:
        assert len([*losses]) == 1


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([*zip(*data().tensors, strict=True)])


@pytest.mark.parametrize("loader", [DataLoader(Stream(), batch_size=4), [[*data().tensors]] * 5])
def test_data_without_indices_gives_its_first_batches(loader: Any) -> None:
    net = Everything()
    assert len(gradients(host(net, loader).calibration(3, loss=loss_of), net)) == 3


class Augmented(Dataset):
    """Draws from every generator at each item."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.rand(5, 6) + random.random() + np.random.rand(), index % 3


def noisy_loss(module: nn.Module, batch: Any) -> Tensor:
    return loss_of(module, (batch[0] + torch.randn_like(batch[0]), batch[1]))


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_and_noise_are_the_same_every_time(workers: int) -> None:
    net, loader = Everything(), DataLoader(Augmented(), batch_size=4, num_workers=workers)
    calibration = host(net, loader).calibration(2, loss=noisy_loss)
    one, other = (gradients(calibration, net) for _ in range(2))
    assert [a for a, _ in one] == [b for b, _ in other]
    assert one[0][0] != one[1][0]


# ---------------------------------------------------------------------- how the network runs


def test_eval_mode_with_gradients_and_without_autocast() -> None:
    net = Everything()
    calibration = host(net, [[*data().tensors]]).calibration(1, loss=loss_of)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gradients(calibration, net)
    assert net.notes.modes == [(False, True, False)]
    with calibration.losses(order=0) as losses:
        assert not next(losses).loss.requires_grad
    with torch.inference_mode(), calibration.losses() as losses:
        assert next(losses).loss.requires_grad
    assert net.training


def test_second_derivatives_of_attention() -> None:
    net = Everything()
    calibration = host(net, [[*data().tensors]]).calibration(1, loss=loss_of)
    weights = [*net.parameters()]
    with calibration.losses(order=2) as losses:
        found = torch.autograd.grad(next(losses).loss, weights, create_graph=True)
        along = torch.stack([(g * w.detach()).sum() for g, w in zip(found, weights, strict=True)]).sum()
        second = torch.autograd.grad(along, weights)
    assert any(float(s.abs().max()) > 0 for s in second)


def test_recurrent_layers_in_eval_mode() -> None:
    net = nn.LSTM(6, 4, batch_first=True)
    calibration = host(net, [[*data().tensors]]).calibration(1, loss=lambda m, b: m(b[0])[0].square().mean())
    assert all(g is not None for g in gradients(calibration, net)[0][1])


# ---------------------------------------------------------------------- no trace


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in net.state_dict().items()}


@pytest.mark.parametrize("end", ["all", "early", "failed"])
def test_nothing_is_left_of_it(end: str) -> None:
    net, loader = Everything(), DataLoader(Augmented(), batch_size=4, shuffle=True)
    found = host(net, loader)
    loss_of(net, next(iter(DataLoader(data(), batch_size=8)))).backward()  # gradients of a window that is open
    net.drop.eval()
    before, kept = state_of(net), [(p.grad, p.grad.clone()) for p in net.parameters() if p.grad is not None]
    flags = [m.training for m in net.modules()]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    expected = float(torch.rand(())), random.random(), float(np.random.rand())
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)

    def use() -> None:
        with found.calibration(2, loss=noisy_loss).losses() as losses:
            for batch in losses:
                batch.loss.backward()  # whoever does not ask torch.autograd.grad leaves nothing either
                if end == "early":
                    return
                if end == "failed":
                    raise KeyError("mine")

    if end == "failed":
        with pytest.raises(KeyError, match="mine"):
            use()
    else:
        use()
    assert (float(torch.rand(())), random.random(), float(np.random.rand())) == expected
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    now = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(g is old and torch.equal(g, copy) for g, (old, copy) in zip(now, kept, strict=True))


def test_hooks_for_gradients_hear_nothing() -> None:
    net, heard = Everything(), []
    calibration = host(net, [[*data().tensors]]).calibration(1, loss=loss_of)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: heard.append(p))
    gradients(calibration, net)
    assert heard == []


def test_what_watches_the_first_batch_does_not_see_it() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))
    method = Static(0.5, print_plan=False)
    run = sparsify(method, net, torch.optim.SGD(net.parameters(), 0.1), steps=10, data=[[*data().tensors]])
    signals, uses, samples = FirstSignals(method), FirstBatch(net, ["1.weight"]), LoopSamples()
    samples.follow(net, 0)
    early = FirstSignals(method)
    gradients(run._host.calibration(1, loss=loss_of), net)
    assert early.chain() == ()
    loss_of(net, [*data().tensors]).backward()
    assert uses.calls
    assert uses.end().of["1.weight"].forward == 24
    assert len(signals.chain()) == 2
    samples.backward(0)
    assert samples.window == 24
    run.close()


def test_frozen_parameters_are_frozen_again() -> None:
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    with requiring_grad([frozen, free]):
        assert frozen.requires_grad
    assert [frozen.requires_grad, free.requires_grad] == [False, True]


def test_what_it_costs_is_told_in_forward_passes() -> None:
    net, told = Everything(), []
    batch = [*data().tensors]
    calibration = Calibration(net, lambda: [batch], loss_of, passed=lambda given, passes: told.append(passes))
    for order in (0, 1, 2):
        with calibration.losses(order) as losses:
            next(losses)
    assert told == [1, 3, 9]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        (1, None, r"Static computes scores from the loss, which a loop of your own does not show\. Give loss="),
        (0, loss_of, r"batches=0 is not a number of batches\. Give a whole number from 1 on"),
        (True, loss_of, r"batches=True is not a number of batches"),
        ("ab", loss_of, r"batches='ab' is not a number of batches"),
        (1.5, loss_of, r"batches=1\.5 is not a number of batches"),
        (iter([1]), loss_of, r"batches=list_iterator can be iterated once, .* Give a list or a loader"),
        (1, loss_of, r"Static computes scores on batches of the training data\. Give sparsify\(\.\.\., data=loader\)"),
    ],
)
def test_what_gives_no_loss_is_refused_at_once(batches: Any, loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host(Everything(), None).calibration(batches, loss=loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: None, r"a scalar, and a NoneType came in its place\. Give loss="),
        (lambda m, b: m(b[0]), r"a scalar, and a tensor of shape \[24, 3\] came in its place"),
        (lambda m, b: loss_of(m, b).detach(), r"does not depend on any parameter that is trained: .* Give loss="),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    net = Everything()
    with (
        pytest.raises(ValueError, match=message),
        host(net, [[*data().tensors]]).calibration(1, loss=loss).losses() as losses,
    ):
        next(losses)


def test_no_batch_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"on batches of data, and there is none\. Give batches="),
        host(Everything(), None).calibration([], loss=loss_of).losses() as losses,
    ):
        next(losses)
