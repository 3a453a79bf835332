"""Averages of sparse weights in a loop: zero where the mask is, and begun anew where a weight is born."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support import loops
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from sparse_callbacks import SET, RigL, SparseRun, Static, sparsify
from sparse_callbacks.core.averages import from_birth
from sparse_callbacks.core.saved_bits import with_truths

DECAY = 0.9
VALUES = [[1.0, -0.5, 0.8, 0.0, 0.3, 0.0], [1.2, -0.4, 0.0, 0.5, 0.0, 0.0], [0.9, 0.0, 0.7, 0.6, -0.2, 0.0]]
MASKS = [[1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1]]
AVERAGES = [[1.0, -0.5, 0.8, 0.0, 0.3, 0.0], [1.02, -0.49, 0.0, 0.5, 0.0, 0.0], [1.008, 0.0, 0.7, 0.51, -0.2, 0.0]]


def row(numbers: list[Any]) -> Tensor:
    return torch.tensor([numbers])


def ema(model: nn.Module, decay: float = DECAY) -> AveragedModel:
    return AveragedModel(model, avg_fn=get_ema_avg_fn(decay))


def is_zero(tensor: Tensor) -> bool:
    """All bits are zero: neither -0.0 nor NaN is."""
    return not tensor.detach().view(torch.int32).any()


def test_an_average_follows_the_table() -> None:
    average = row(VALUES[0])
    for before, now, values, expected in zip(MASKS, MASKS[1:], VALUES[1:], AVERAGES[1:], strict=False):
        mixed = DECAY * average + (1 - DECAY) * row(values)
        born = row(now).bool() & ~row(before).bool()
        average = from_birth(mixed, row(values), row(now).bool(), born)
        assert torch.allclose(average, row(expected), atol=1e-6)
        assert is_zero(average[~row(now).bool()])


class OneRow:
    """A run over one matrix of six weights, whose masks and values the test gives."""

    def __init__(self) -> None:
        self.model = nn.Linear(6, 1, bias=False)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.run = sparsify(Static(0.5, print_plan=False), self.model, optimizer, math.inf)
        self.weights = self.run.method.weights

    def hold(self, mask: list[int], values: list[float]) -> None:
        self.weights.set_masks({"weight": row(mask).bool()})
        with torch.no_grad():
            self.model.weight.copy_(row(values))


def averaged_row() -> tuple[OneRow, AveragedModel]:
    """A row of weights in a run, and its moving average, which the run holds to the masks."""
    one = OneRow()
    averaged = ema(one.model)
    one.run.average(averaged)
    return one, averaged


def test_an_averaged_model_follows_the_table() -> None:
    one, averaged = averaged_row()
    for mask, values, expected in zip(MASKS, VALUES, AVERAGES, strict=True):
        one.hold(mask, values)
        averaged.update_parameters(one.model)
        assert torch.allclose(averaged.module.weight, row(expected), atol=1e-6)


def test_a_weight_that_was_dropped_and_grown_between_two_averages_begins_anew() -> None:
    one, averaged = averaged_row()
    one.hold([1, 1, 0, 0, 0, 0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    averaged.update_parameters(one.model)
    one.hold([0, 1, 0, 0, 0, 0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert averaged.module.weight.tolist() == [[0, 1, 0, 0, 0, 0]]  # at once, not at the next average
    one.hold([1, 1, 0, 0, 0, 0], [3.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    averaged.update_parameters(one.model)
    assert torch.allclose(averaged.module.weight, row([3.0, 1.2, 0.0, 0.0, 0.0, 0.0]))
    averaged.update_parameters(one.model)  # born once
    assert averaged.module.weight[0, 1] > 1.2


def test_births_of_several_updates_wait_for_the_next_average() -> None:
    one, averaged = averaged_row()
    one.hold([1, 0, 0, 0, 0, 0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    averaged.update_parameters(one.model)
    one.hold([1, 1, 0, 0, 0, 0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    one.hold([1, 1, 1, 0, 0, 0], [1.0, 5.0, 6.0, 0.0, 0.0, 0.0])
    averaged.update_parameters(one.model)
    assert torch.allclose(averaged.module.weight, row([1.0, 5.0, 6.0, 0.0, 0.0, 0.0]))


def test_whatever_the_averaging_function_gives_pruned_weights_are_zero() -> None:
    one = OneRow()
    averaged = AveragedModel(one.model, avg_fn=lambda average, value, _: average * value / value)
    one.run.average(averaged)
    one.hold(MASKS[0], VALUES[0])
    for _ in range(2):
        averaged.update_parameters(one.model)
        assert is_zero(averaged.module.weight[~row(MASKS[0]).bool()])


def test_an_average_that_was_made_before_the_masks_is_masked_at_once() -> None:
    model = loops.net()
    averaged = ema(model)
    run = sparsify(RigL(0.8, print_plan=False), model, loops.sgd(model), 10)
    assert not sparse(averaged, run)
    run.average(averaged)
    assert sparse(averaged, run)


def sparse(averaged: AveragedModel, run: SparseRun) -> bool:
    parameters = dict(averaged.module.named_parameters())
    return all(is_zero(parameters[n][~mask]) for n, mask in run.masks.items())


def trained(name: str, within: bool) -> tuple[AveragedModel, SparseRun]:
    """A run of a method over which an average is taken of each step, within the batch or behind it."""
    model, batches = loops.net(), loops.data(batches=2 * loops.EPOCH)
    optimizer, method = loops.sgd(model), loops.METHODS[name](**({"restart": False} if name == "gap" else {}))
    run = sparsify(method, model, optimizer, loops.STEPS, data=batches, epoch=loops.EPOCH)
    averaged = ema(model)
    run.average(averaged)
    for x, y in batches:
        with run.batch():
            nn.functional.cross_entropy(model(x), y).backward()
            if within:  # after L0 has drawn its gates
                averaged.update_parameters(model)
                assert sparse(averaged, run)
        optimizer.step()
        optimizer.zero_grad()
        if not within:
            averaged.update_parameters(model)
        assert sparse(averaged, run)
    run.close()
    return averaged, run


@pytest.mark.parametrize("name", loops.METHODS)
def test_the_average_of_every_method_is_sparse_wherever_it_is_taken(name: str) -> None:
    averaged, run = trained(name, within=False)
    assert run.step > 0
    trained(name, within=True)
    assert all(p.isfinite().all() for p in averaged.parameters())


def test_effective_weights_are_averaged_at_whatever_point_of_a_batch() -> None:
    """Of constrained L0 the medians and not a sample, of DPF not the dense values of a step."""
    model, batches = loops.net(), loops.data()
    optimizer = loops.sgd(model)
    run = sparsify(loops.METHODS["l0"](), model, optimizer, loops.STEPS, data=batches)
    averaged = ema(model, 0.0)
    run.average(averaged)
    for x, y in batches:
        outside = copy.deepcopy(model.state_dict())
        with run.batch():
            nn.functional.cross_entropy(model(x), y).backward()
            sample = copy.deepcopy(model.state_dict())
            averaged.update_parameters(model)
            assert all(torch.equal(t, sample[k]) for k, t in model.state_dict().items())
        assert all(torch.equal(t, outside[k]) for k, t in averaged.module.state_dict().items())
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(t, outside[k]) for k, t in sample.items())


def test_dense_values_within_a_step_are_not_averaged() -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    run = sparsify(loops.METHODS["dpf"](start=0), model, optimizer, loops.STEPS)
    averaged = ema(model, 0.0)
    run.average(averaged)
    for x, y in loops.data():
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            run.method.weights.swap_in(run.masks)  # as in the middle of an optimizer's step
            dense = {n: p.clone() for n, p in run.method.params.items()}
            averaged.update_parameters(model)
            assert sparse(averaged, run)
            assert all(torch.equal(p, dense[n]) for n, p in run.method.params.items())
            run.method.weights.swap_out(run.masks)
        optimizer.step()
        optimizer.zero_grad()
    assert any(p[~run.masks[n]].any() for n, p in dense.items())


# ---------------------------------------------------------------------- state, and what is refused


def resumable(state: Any = None, average: Any = None, steps: range = range(14)) -> tuple[Any, AveragedModel, SparseRun]:
    """SET with an update every second step and an average every fifth, from the first or from a saved step on."""
    model = loops.net()
    optimizer = loops.sgd(model)
    averaged = ema(model)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.load_state_dict(state["averaged"])
    method = SET(0.8, every=2, drop_fraction=0.5, print_plan=False)
    run = sparsify(method, model, optimizer, 14, state=None if state is None else state["run"])
    run.average(averaged)
    batches = list(loops.data(batches=14))
    for step in steps:
        x, y = batches[step]
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            averaged.update_parameters(model)
    saved = {"model": model, "optimizer": optimizer, "averaged": averaged, "run": run}
    return copy.deepcopy({k: v.state_dict() for k, v in saved.items()}), averaged, run


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_resumed_average_is_that_of_a_run_that_never_stopped(stop: int) -> None:
    whole, _, _ = resumable()
    half, _, _ = resumable(steps=range(stop))
    assert "0" in half["run"]["averages"]
    assert stop == 5 or half["run"]["averages"]["0"]["born"]
    again, _, _ = resumable(half, steps=range(stop, 14))
    assert all(torch.equal(t, again["averaged"][k]) for k, t in whole["averaged"].items())


def test_an_average_goes_on_when_a_state_is_loaded_into_the_run() -> None:
    half, _, _ = resumable(steps=range(8))
    _, averaged, run = resumable(steps=range(0))
    run.load_state_dict(half["run"])
    assert run.state_dict()["averages"]["0"]["born"].keys() == half["run"]["averages"]["0"]["born"].keys()
    name = next(iter(run.masks))
    run.method.weights.set_masks({name: ~run.masks[name]})
    assert sparse(averaged, run)


def test_births_that_no_run_can_have_saved_are_refused() -> None:
    half, _, run = resumable(steps=range(8))
    run.close()
    half["run"] = with_truths(half["run"])
    name, born = next((n, b) for n, b in half["run"]["averages"]["0"]["born"].items() if b.any())
    born[~half["run"]["masks"][name]] = True
    with pytest.raises(ValueError, match=r"born since an average are not among the active ones"):
        resumable(half)
    half["run"]["averages"]["0"] = {"born": {name: born.float()}}
    with pytest.raises(ValueError, match=r"under 'averages' has under '0' what .*truth values"):
        resumable(half)
    half["run"]["averages"] = {"0": 3}
    with pytest.raises(ValueError, match=r"where a callback has what its average needs"):
        resumable(half)


def test_what_is_no_average_of_the_model_is_refused() -> None:
    model = loops.net()
    run = sparsify(RigL(0.8, print_plan=False), model, loops.sgd(model), 10)
    with pytest.raises(TypeError, match=r"Sequential takes no average by update_parameters\(\)"):
        run.average(model)
    with pytest.raises(ValueError, match=r"0\.weight, .* have no average of their shape"):
        run.average(ema(nn.Linear(2, 2)))
    run.close()
    with pytest.raises(RuntimeError, match="this run is closed"):
        run.average(ema(model))


def test_copies_and_a_run_that_is_over_take_averages_as_ever() -> None:
    one = OneRow()
    averaged = AveragedModel(one.model)
    one.run.average(averaged)
    one.hold(MASKS[0], VALUES[0])
    averaged.update_parameters(one.model)
    plain = nn.Linear(6, 1, bias=False)
    for copied in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged))):
        copied.update_parameters(plain)
        assert copied.n_averaged == 2
        assert copied.module.weight.detach().ne(0).all()
    assert averaged.n_averaged == 1
    one.run.close()
    assert "update_parameters" not in vars(averaged)
    assert not one.weights.watchers
