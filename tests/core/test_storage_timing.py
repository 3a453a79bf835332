"""The times of storages, which one they choose, and the rows that each layer sees."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.nets import mlp
from torch import Tensor, nn

from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.storage_timing import faster, rows_of_layers, times_of, times_text

SHAPE, ROWS, DENSITY = (32, 24), 10, 0.25


class Stopwatch:
    """Gives the same times whatever is measured, and keeps what it was asked to measure."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.asked: list[dict[str, Any]] = []
        self.calls = 0

    def __call__(self, steps: Sequence[Callable[[], None]], readings: int, **words: Any) -> list[float]:
        for step in steps:
            step()
        self.asked.append(words | {"readings": readings})
        return self.times[: len(steps)]


def test_times_are_by_storage_and_each_question_is_measured_once() -> None:
    measure = Stopwatch(5.0, 3.0)
    assert times_of(SHAPE, ROWS, DENSITY, torch.float32, measure=measure) == {"masked": 5.0, "sparse": 3.0}
    times_of(SHAPE, ROWS, DENSITY, torch.float32, measure=measure)
    times_of(SHAPE, 2000, DENSITY, torch.float32, measure=measure)
    times_of(SHAPE, 3000, DENSITY, torch.float32, measure=measure)  # both are capped
    assert len(measure.asked) == 2
    times_of(SHAPE, ROWS, DENSITY, torch.float64, measure=measure)
    times_of(SHAPE, ROWS, 0.5, torch.float32, measure=measure)
    assert len(measure.asked) == 4


def test_another_number_of_threads_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Stopwatch(5.0, 3.0)
    for threads in (1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        times_of(SHAPE, ROWS, DENSITY, torch.float32, measure=measure)
    # with one thread its own time counts, which other processes do not lengthen
    assert [asked["cpu_time"] for asked in measure.asked] == [True, False]


@pytest.mark.parametrize(
    ("medians", "clear"),
    [([1.0, 2.5], True), ([2.5, 1.0], True), ([1.0, 1.9], False), ([9.0, 3.0, 1.0], True), ([9.0, 8.0, 1.0], False)],
)
def test_no_further_reading_is_needed_where_all_times_are_far_apart(medians: list[float], clear: bool) -> None:
    measure = Stopwatch(5.0, 3.0)
    times_of(SHAPE, ROWS, DENSITY, torch.float32, measure=measure)
    assert measure.asked[0]["settled"](medians) is clear


def test_a_step_is_taken_on_a_layer_of_the_density_with_the_batch_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, tuple[int, ...], float]] = []
    for kind in (nn.Linear, SparseLinear):
        forward = kind.forward

        def noted(layer: Any, x: Tensor, forward: Any = forward) -> Tensor:
            seen.append((type(layer).__name__, tuple(x.shape), getattr(layer, "density", 1.0)))
            return forward(layer, x)

        monkeypatch.setattr(kind, "forward", noted)
    times_of((300, 400), 5000, 0.1, torch.float64, measure=Stopwatch(1.0, 1.0))
    assert {(name, shape) for name, shape, _ in seen} == {("Linear", (1024, 400)), ("SparseLinear", (1024, 400))}
    assert seen[-1][2] == pytest.approx(0.1, rel=0.02)


def test_timing_leaves_global_random_states_and_modes_alone() -> None:
    states = torch.get_rng_state(), random.getstate()
    with torch.inference_mode(), torch.device("meta"):
        times_of(SHAPE, 7, DENSITY, torch.float32, measure=Stopwatch(1.0, 1.0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize(("sparse", "storage"), [(8.9, "sparse"), (9.0, "sparse"), (9.1, "masked"), (20.0, "masked")])
def test_sparse_is_chosen_only_where_it_is_faster_by_a_tenth(sparse: float, storage: str) -> None:
    assert faster({"masked": 10.0, "sparse": sparse}) == storage
    assert faster({"masked": 10.0, "sparse": sparse, "grouped": 1.0}) == storage  # another pattern must be asked for


def test_the_plan_shows_the_time_of_the_choice_and_of_what_was_not_chosen() -> None:
    times = {"masked": 6.91, "sparse": 4.1}
    assert times_text(times, "sparse") == "4.1 ms, masked 6.91"
    assert times_text(times, "masked") == "6.91 ms, sparse 4.1"


def test_steps_are_really_timed() -> None:
    times = times_of((64, 48), 16, 0.2, torch.float32)
    assert times.keys() == {"masked", "sparse"}
    assert all(0 < time < 1000 for time in times.values())


# ---------------------------------------------------------------------- rows


class Net(nn.Module):
    """A layer that is called twice, one that runs only in training, one that is never called, a norm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.idle = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 6)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.dropout(self.norm(self.body(input=self.body(x))))
        return self.head(x) if self.training else x


def test_rows_of_a_layer_are_those_of_all_of_its_calls_in_training() -> None:
    net = Net()
    assert rows_of_layers(net, lambda: net(torch.ones(1, 6))) == {"body": 2, "head": 1}


def test_sequences_are_flattened() -> None:
    net = mlp(4, 5, 3)
    net[2] = SparseLinear.random(5, 3, 2)
    assert rows_of_layers(net, lambda: net(torch.ones(7, 2, 4))) == {"0": 14, "2": 14}


def test_counting_rows_leaves_no_trace() -> None:
    net = Net().eval()
    net.body.train()
    random_state = torch.get_rng_state()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rows_of_layers(net, lambda: net(torch.ones(3, 6)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == [False, True, False, False, False, False]
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_the_layers_of_a_transformer_block_are_seen() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # whose fast path in eval mode calls no layer
    found = rows_of_layers(block, lambda: block(torch.ones(2, 5, 8)))
    assert found == {"linear1": 10, "linear2": 10}


def test_a_network_that_only_runs_in_eval_mode_is_counted_there() -> None:
    class Picky(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("training needs targets")
            return super().forward(x)

    net = Picky(nn.Linear(4, 4))
    assert rows_of_layers(net, lambda: net(torch.ones(3, 4))) == {"0": 3}
    assert net.training


def test_a_pass_that_fails_is_refused_in_words_and_leaves_no_hook() -> None:
    net = mlp(4, 5, 3)
    with pytest.raises(ValueError, match=r"the pass that counts the rows of each layer failed .*Give rows="):
        rows_of_layers(net, lambda: net(torch.ones(3, 7)))
    assert not any(m._forward_pre_hooks for m in net.modules())
