"""What an update of RigL sees of an accumulation window: exactly the gradient that the step would have been taken with."""

import copy

import pytest
import torch
from support.exchanged_loops import HEAD, MOVING, batches, both, exchange, first_masks, loss_of, net
from torch import Tensor, nn

from sparse_callbacks import RigL, SparseRun, sparsify


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_the_loop_has_dropped_do_not_count(to_none: bool) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data = batches()
        for _ in range(6):
            (100 * loss_of(model, next(data))).backward()  # an attack on the input, say
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model, next(data)).backward()
            loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)

    both(loop)


class Twice(nn.Module):
    """A layer that is called twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        first, act, second, _, head = self.net
        return head(act(second(act(second(act(first(x)))))))


def test_a_layer_that_a_pass_goes_through_twice_counts_twice() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data = batches()
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(2):
                loss_of(model, next(data)).backward()
            optimizer.step()

    masks = {f"net.{name}": mask for name, mask in first_masks(net()).items()}
    both(loop, Twice, masks, exclude=f"net.{HEAD}")


def test_gradients_of_inputs_alone_do_not_count() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data = batches()
        for _ in range(6):
            x, y = next(data)
            x.requires_grad_(True)
            loss = loss_of(model, (x, y))
            (slope,) = torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()  # of the same graph, once more
            loss_of(model, ((x + slope.sign()).detach(), y)).backward()
            optimizer.step()
            optimizer.zero_grad()

    both(loop)


def test_a_step_that_a_grad_scaler_skips_leaves_nothing_behind() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        scaler, data = torch.amp.GradScaler("cpu", init_scale=8.0), batches()
        for number in range(9):
            for _ in range(2):
                scaler.scale(loss_of(model, next(data)) * (torch.inf if number in (1, 3, 4) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    runs = both(loop)
    assert runs[1].figures()["update/drop_fraction"] == 0.3


def test_an_infinite_gradient_of_pruned_weights_puts_an_update_off() -> None:
    def reads_nothing() -> dict[str, Tensor]:
        masks = first_masks(net())
        masks["0.weight"][7] = False
        return masks

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        at = torch.inf
        model[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
        model[0].register_forward_hook(  # type: ignore[index]
            lambda *args: args[2].register_hook(lambda g: g.index_fill(1, torch.tensor(7), at)) and None
        )
        data, updates = batches(), []
        for number in range(7):
            at = torch.inf if number < 2 else 0.5
            loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
            updates.append(run.updates)
            assert all(p.isfinite().all() for p in model.parameters())
        assert updates == [0, 0, 1, 1, 1, 2, 2]

    both(loop, masks=reads_nothing())


def test_only_windows_of_updates_are_recorded_and_nothing_stays() -> None:
    model = exchange(net(), first_masks(net()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sparsify(RigL(0.8, **MOVING | {"every": 3, "start": 2}), model, optimizer, steps=100)
    data, recorded = batches(), []
    for _ in range(9):
        optimizer.zero_grad()
        for _ in range(2):
            loss_of(model, next(data)).backward()
        recorded.append(None if model[0].records is None else len(model[0].records))
        updates = run.updates
        optimizer.step()
        assert (run.updates > updates) == (recorded[-1] is not None)
        assert not model[0].records
    assert recorded == [None, None, 2, None, None, None, 2, None, None]
    run.close()
    assert model[0].records is None


def test_a_copy_of_a_layer_that_records_records_nothing() -> None:
    model = exchange(net(), first_masks(net()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(RigL(0.8, **MOVING), model, optimizer, steps=100)
    loss_of(model, next(batches())).backward()
    assert model[0].records
    assert copy.deepcopy(model)[0].records is None
