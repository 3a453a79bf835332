"""Runs with sparse storage of models that torch has compiled: one graph, in ordinary steps, for the whole run."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.exchanged_loops import MOVING, batches, loss_of, net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_callbacks import SparseRun, sparsify
from sparse_callbacks.methods import SET, RigL

pytestmark = pytest.mark.filterwarnings("ignore:.*ended in the middle of its updates")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def is_compiled() -> bool:
    """Whether torch runs compiled code now."""
    told = torch.compile(lambda x: x + int(torch.compiler.is_compiling()), backend="eager")
    return bool(told(torch.zeros(1)))


def trained(kind: type[Any], fullgraph: bool | None, steps: int = 12) -> tuple[nn.Module, int, SparseRun]:
    """A model after so many steps, the number of graphs that were made of it, and its run; not compiled where None."""
    model, counter = net(), CompileCounterWithBackend("aot_eager")
    called: Any = model if fullgraph is None else torch.compile(model, fullgraph=fullgraph, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run = sparsify(kind(0.8, storage="sparse", **MOVING), called, optimizer, steps=100)
    for _, batch in zip(range(steps), batches(), strict=False):
        loss_of(called, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, counter.frame_count, run


@pytest.mark.combinations
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("kind", [SET, RigL])
def test_the_graph_is_made_once_and_windows_of_updates_break_none(kind: type[Any], fullgraph: bool) -> None:
    model, graphs, run = trained(kind, fullgraph)
    run.close()
    assert graphs == 1
    assert run.updates > 2
    plain, _, other = trained(kind, None)
    other.close()
    for ours, expected in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert is_compiled()


@pytest.mark.combinations
@pytest.mark.parametrize("end", ["closed", "dropped", "failed"])
@pytest.mark.parametrize("steps", [0, 3])  # before the first batch; in the window of an update
def test_compiled_code_runs_again_when_a_run_ends_in_whatever_way(steps: int, end: str) -> None:
    model, _, run = trained(RigL, None, steps)
    assert not is_compiled()
    if end == "closed":
        run.close()
    elif end == "failed":
        with pytest.raises(ZeroDivisionError), run:
            _ = 1 / 0
    del model, run
    gc.collect()
    assert is_compiled()


def test_an_optimizer_that_never_steps_does_not_keep_a_model_uncompiled() -> None:
    model = net()
    first = torch.optim.SGD([p for n, p in model.named_parameters() if n != "2.weight"], 0.1)
    second = torch.optim.SGD([model[2].weight], 0.1)
    with sparsify(SET(0.8, storage="sparse", **MOVING), model, [first, second], steps=20) as run:
        loss_of(model, next(batches())).backward()
        first.step()
        assert is_compiled()
        run.close()
