"""Compiled code of the process runs compiled again, in whatever way a loop with sparse storage ends."""

import copy
import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.exchanged_loops import MOVING, OPTIMIZERS, batches, loss_of, net, train
from support.stance import stance
from torch import nn

from sparse_callbacks import RigL, SparseLinear, SparseRun, sparsify, to_dense
from sparse_callbacks.core.live.uncompiled import Uncompiled

pytestmark = pytest.mark.filterwarnings("ignore:.*ended in the middle of its updates")


def begun(steps: int, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer, SparseRun]:
    """A run of RigL after so many steps and the backward pass of the next one, in a window that records."""
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    run = sparsify(RigL(0.8, **MOVING | {"storage": "sparse"} | changes), model, optimizer, steps=100)
    train(model, optimizer, 0, steps)
    optimizer.zero_grad()
    loss_of(model, next(batches(2 * steps))).backward()
    assert stance() == "force_eager"
    return model, optimizer, run


STEPS = pytest.mark.parametrize("steps", [0, 3])  # in the first batch; in the window of an update


@STEPS
def test_a_model_that_outlives_its_run_keeps_nothing_uncompiled(steps: int) -> None:
    model, optimizer, run = begun(steps)
    del optimizer, run
    gc.collect()
    assert stance() == "default"
    layer: Any = model[0]  # type: ignore[index]
    assert layer.records is None
    assert not layer._forward_pre_hooks


@STEPS
def test_another_run_ends_one_that_nobody_can_reach(steps: int) -> None:
    begun(steps)
    with begun(0)[2]:
        pass
    assert stance() == "default"


@STEPS
def test_a_warning_that_is_an_error_does_not_keep_a_run_open(steps: int) -> None:
    _, _, run = begun(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ended in the middle"):
            run.close()
    assert stance() == "default"
    assert run.is_closed


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@STEPS
def test_an_error_in_a_loop_ends_the_window_though_its_traceback_is_kept(steps: int, error: type[Exception]) -> None:
    _, _, run = begun(steps)
    with pytest.raises(error) as kept, run:
        raise error
    assert stance() == "default"
    assert kept.tb is not None


@STEPS
def test_an_error_while_a_failed_run_ends_does_not_keep_it_open(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, run = begun(steps)
    monkeypatch.setattr(run._engine, "batch_over", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), run:
        raise KeyboardInterrupt
    assert stance() == "default"


def test_layers_that_are_made_dense_record_no_more() -> None:
    model, _, run = begun(3)
    layer: Any = model[0]  # type: ignore[index]
    to_dense(model)
    assert stance() == "default"
    assert layer.records is None
    run.close()


def test_a_copied_method_takes_no_part_in_the_window_of_its_run() -> None:
    _, _, run = begun(3)
    copied = copy.deepcopy(run.method)
    run.close()
    assert stance() == "default"
    assert all(layer.records is None for layer in copied.weights.layers_stored.values())


def test_a_run_that_is_refused_after_windows_have_opened_leaves_none() -> None:
    class Refuses(RigL):
        def begin_training(self, epoch: int) -> dict[str, float]:
            assert stance() == "force_eager"
            raise ValueError("no")

    model = net()
    method = Refuses(0.8, **MOVING | {"storage": "sparse", "start": 0})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="no"):
        sparsify(method, model, optimizer, steps=100)
    assert stance() == "default"
    assert not any(isinstance(m, SparseLinear) for m in model.modules())


def test_a_stance_that_the_user_takes_within_a_window_ends_as_it_began() -> None:
    mine = Uncompiled()
    mine.enter()
    with torch.compiler.set_stance("eager_on_recompile"):
        mine.leave()
        assert stance() == "eager_on_recompile"
    assert stance() == "default"


def test_a_stance_around_a_window_comes_back_when_the_window_is_over() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        mine = Uncompiled()
        mine.enter()
        mine.enter()
        mine.leave()
        assert stance() == "force_eager"
        mine.leave()
        assert stance() == "eager_on_recompile"
    assert stance() == "default"


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def closed(run: SparseRun) -> None:
    run.close()


def failed(run: SparseRun) -> None:
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt


@pytest.mark.parametrize("end", [closed, failed])
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_a_run_that_was_broken_off_within_a_window_resumes_bitwise(
    storage: str, end: Callable[[SparseRun], None]
) -> None:
    changes = {"storage": storage, "group": 4}
    whole, first, one = begun(3, **changes)
    with one:
        loss_of(whole, next(batches(7))).backward()
        first.step()
        train(whole, first, 4, 8)

    model, optimizer, run = begun(3, **changes)
    end(run)
    saved = through_a_file(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "run": run.state_dict(),
            "grads": {n: p.grad for n, p in model.named_parameters()},
        }
    )
    assert set(saved["run"]["records"]) == {"0.weight", "2.weight"}
    model = net(seed=1)
    model.load_state_dict(saved["model"])
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    method = RigL(0.8, **MOVING | changes)
    with sparsify(method, model, optimizer, steps=100, state=saved["run"]) as run:
        optimizer.load_state_dict(saved["optimizer"])
        for name, p in model.named_parameters():
            p.grad = saved["grads"][name]
        loss_of(model, next(batches(7))).backward()
        optimizer.step()
        train(model, optimizer, 4, 8)
        assert run.updates == one.updates > 1
    expected = whole.state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    assert "records" not in run.state_dict() or not run.state_dict()["records"]
