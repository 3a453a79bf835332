"""Accumulation windows that are open when a checkpoint is written: several processes, optimizers, and half precision."""

from pathlib import Path
from typing import Any, Unpack, cast

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from support import processes
from support.inside import skipped_steps
from support.methods import every_steady_method, method, moves
from support.processes import run_processes
from torch import Tensor, nn

from sparse_callbacks import SparsityCallback
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.step import Step
from sparse_callbacks.testing.comparison import differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Rivals, conv_net
from sparse_callbacks.testing.runs import Stops, fit


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two DDP processes found in manual optimization, over every method; one launch for all."""
    return run_processes("windows", tmp_path_factory.mktemp("ddp"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@every_steady_method
def test_windows_of_two_processes_equal_those_of_one(name: str, two_processes: list[dict[str, Any]]) -> None:
    """In manual optimization, where gradients are reduced with the last micro-batch alone; also resumed inside a
    window."""
    alone = processes.train_in_windows(name, 0, 1)
    assert (alone["end"]["counts"][0][1] > 2) == moves(name)
    for found in two_processes:
        assert differences(alone["masks"], found[name]["whole"]["masks"]) == []
        assert differences(alone["masks"][processes.OPEN_STOP :], found[name]["resumed"]["masks"]) == []
        for end in (found[name][run]["end"] for run in ("whole", "resumed")):
            # the mean of two halves rounds otherwise
            for key, value in alone["end"]["weights"].items():
                assert torch.allclose(value, end["weights"][key], rtol=1e-7, atol=1e-10), key
            for key, value in alone["end"]["aux"][0].items():
                assert torch.allclose(value.double(), end["aux"][0][key].double(), rtol=1e-6, atol=1e-9), key


def resumed_differently(
    make: Any, callback: Any, folder: Path, after: tuple[int, ...], scaled: bool = False
) -> dict[int, list[str]]:
    """What differs at the end between never stopping and resuming after each of these batches."""

    def options() -> dict[str, Any]:
        if not scaled:
            return {}
        # the scale doubles after every step and is halved by an inf
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}

    stops, whole, first = Stops(folder, after), make(0), callback()
    expected = snapshot(fit(whole, first, stops, loader=Batches(batches=9), **options()), whole, first)
    found = {}
    for batch in after:
        module, other = make(1), callback()
        run = fit(module, other, loader=Batches(batches=9), ckpt_path=stops.path(batch), **options())
        found[batch] = differences(expected, snapshot(run, module, other))
    return found


class Uneven(Rivals):
    """The maker accumulates two batches for a step; the critic steps in each of them, and last."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        maker, critic = cast(Any, self.optimizers())
        self.manual_backward(nn.functional.cross_entropy(self(x), y))
        if batch_idx % 2:
            maker.step()
            maker.zero_grad()
        self.step_with(1, critic, self.critic, nn.functional.cross_entropy(self.critic(self.maker(x).detach()), y))


@pytest.mark.combinations
@pytest.mark.parametrize("scaled", [False, True])
@every_steady_method
def test_the_window_of_one_optimizer_is_saved_where_another_has_stepped_in_it(
    name: str, scaled: bool, tmp_path: Path
) -> None:
    """Under a GradScaler also with another scale for the second half of the window."""
    found = resumed_differently(Uneven, lambda: method(name, every=1, stop=8), tmp_path, (1, 2, 3, 12), scaled)
    assert found == {b: [] for b in (1, 2, 3, 12)}


class Overflows(ByHand):
    """One micro-batch of the run has an infinite gradient at an active and at a pruned weight."""

    def __init__(self, seed: int) -> None:
        super().__init__(conv_net(seed), window=3)

    def loss(self, batch: Any) -> Tensor:
        found = super().loss(batch)
        return found * torch.inf if self.trainer.fit_loop.total_batch_idx == 4 else found


@every_steady_method
def test_a_window_with_a_skipped_step_is_resumed_bitwise(name: str, tmp_path: Path) -> None:
    made: list[Any] = []

    def callback() -> Any:
        made.append(method(name, every=1, stop=5))
        return made[-1]

    found = resumed_differently(Overflows, callback, tmp_path, (4, 5, 7), scaled=True)
    assert found == {b: [] for b in (4, 5, 7)}
    assert [skipped_steps(c) for c in made] == [1, 1, 1, 0]


class SumsGradients(Method):
    """A method from outside that reads dense gradients: it sums them up, and its masks stay."""

    def __init__(self, sparsity: float = 0.8, **options: Unpack[Options]) -> None:
        super().__init__(sparsity, **options)

    def wants_dense_gradients(self, step: Step) -> bool:
        return True

    def after_step(self, step: Step) -> None:
        for name in step.names:
            gradient = step.gradient(name)
            assert gradient is not None
            self.aux[f"sum/{name}"] = self.aux.get(f"sum/{name}", 0) + gradient


class SumsGradientsInATrainer(SumsGradients, SparsityCallback):
    """The same as a callback."""


def test_a_method_from_outside_reads_the_gradients_of_the_whole_window(tmp_path: Path) -> None:
    def make(seed: int) -> ByHand:
        return ByHand(processes.matrices(seed), window=3)

    def callback() -> Any:
        return SumsGradientsInATrainer(print_plan=False)

    assert resumed_differently(make, callback, tmp_path, (1, 2, 4, 5)) == {b: [] for b in (1, 2, 4, 5)}
    sums = callback()
    module = make(0)
    fit(module, sums, loader=Batches(batches=3), max_epochs=1)
    plain = processes.matrices(0)
    with torch.no_grad():
        for key, mask in sums.masks.items():
            plain.get_parameter(key.removeprefix("net.")).mul_(mask)
    for x, y in Batches(batches=3):
        (nn.functional.cross_entropy(plain(x.double()), y) / 3).backward()
    for key in sums.masks:
        torch.testing.assert_close(sums.aux[f"sum/{key}"], plain.get_parameter(key.removeprefix("net.")).grad)
