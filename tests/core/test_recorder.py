"""The record of a run in a hand-written loop: what it counts, what it writes, and how it is resumed."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.counted import FORWARD, NETS, STEPS, TOTALS, method_for, network
from support.sam import FORMS
from torch import Tensor, nn

from sparse_callbacks import CTRE, GMP, sparsify
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.record_file import RecordedRun, has_record, read_record
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods import SET, RigL, Static

pytestmark = pytest.mark.filterwarnings("ignore")  # of runs that are shorter than their calendars

BATCH = 8
# what differs between two runs that do the same
TIMES = ("seconds",)


def fit(
    folder: Path,
    method: Method,
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    every: int = 4,
    data: Any = None,
    **options: Any,
) -> RecordedRun:
    """A recorded run of batches of 8 random samples."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(0)
    with sparsify(method, model, optimizer, steps=steps, data=data) as run:
        run.report(folder, every=every, page=False, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            with run.batch():
                model(torch.randn(BATCH, *shape, generator=generator)).square().mean().backward()
            optimizer.step()
    return read_record(folder)


def timeless(rows: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_warnings_that_come_before_the_record_are_in_it(tmp_path: Path) -> None:
    model, shape = network("mlp")
    warnings = fit(tmp_path, GMP(0.9, stop=50, print_plan=False), model, shape, 12).run.warnings
    assert [text.partition(":")[0] for text in warnings] == ["doctor/short_run"]


# ---------------------------------------------------------------------- what training has cost


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", ["set", "rigl", "snfs", "gmp", "dpf", "dpf_cubic", "gap", "gap_finetuned"])
def test_a_recorded_run_costs_what_was_worked_by_hand(tmp_path: Path, kind: str, name: str) -> None:
    model, shape = network(kind)
    phases = 12 if kind == "conv" else 8
    steps = {"gap": phases, "gap_finetuned": phases + 4}.get(name, STEPS)
    last = fit(tmp_path, method_for(kind, name), model, shape, steps).rows[-1]
    assert last["flops/training_sparse_layers"] == 2 * BATCH * TOTALS[kind][name]
    assert last["flops/training_sparse_layers_dense"] == 2 * BATCH * 3 * steps * FORWARD[kind][0]
    assert last["flops/inference_sparse_layers_dense"] == 2 * FORWARD[kind][0]
    assert last["samples"] == BATCH * steps
    # every weight of these networks is sparse, and biases are not counted
    assert last["flops/training"] == last["flops/training_sparse_layers"]


def test_passes_over_the_data_are_in_the_cost_and_similarities_apart(tmp_path: Path) -> None:
    model, shape = network("mlp")
    data = torch.utils.data.DataLoader(torch.randn(4 * BATCH, *shape), batch_size=BATCH)
    method = CTRE(0.9, distribution="uniform", print_plan=False)
    last = fit(tmp_path, method, model, shape, STEPS, data=data).rows[-1]
    assert last["flops/passes"] == 2 * 7040
    assert last["flops/training"] == last["flops/training_sparse_layers"] == 2 * (31680 + 7040)
    assert last["flops/similarities"] == 2 * 69696


def test_layers_that_stay_dense_are_counted_whole(tmp_path: Path) -> None:
    model, shape = network("conv")
    method = Static(0.9, distribution="uniform", exclude="conv*", print_plan=False)
    first, *_, last = fit(tmp_path, method, model, shape, STEPS).rows
    dense, sparse = 64 * 36 + 9 * 108, 92 + 21
    assert first["flops/inference"] == 2 * (dense + sparse)
    assert first["flops/inference_sparse_layers"] == 2 * sparse
    assert last["flops/training"] == 2 * BATCH * STEPS * 3 * (dense + sparse)
    assert last["flops/training_dense"] == 2 * BATCH * STEPS * 3 * FORWARD["conv"][0]
    assert last["active/mean"] == 36 + 108 + 92 + 21 + (4 + 6 + 17 + 12)


def test_the_average_of_active_weights_is_that_of_the_steps(tmp_path: Path) -> None:
    model, shape = network("mlp")
    active: list[int] = []
    method = GMP(0.9, every=1, start=0, stop=STEPS, distribution="uniform", print_plan=False)
    before = method.before_step

    def before_step(step: Step) -> None:
        active.append(sum(method.weights.active_counts.values()))
        before(step)

    method.before_step = before_step  # type: ignore[method-assign]
    last = fit(tmp_path, method, model, shape, STEPS).rows[-1]
    assert len(set(active)) > 3
    assert last["active/mean"] == pytest.approx(sum(active) / len(active) + 33 + 12)


# ---------------------------------------------------------------------- samples and windows


def loop(folder: Path, batches: Iterator[int] | list[int], accumulate: int = 1, **options: Any) -> RecordedRun:
    """A recorded run over batches of these sizes."""
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sizes = list(batches)
    with sparsify(Static(0.9, distribution="uniform", print_plan=False), model, optimizer, steps=len(sizes)) as run:
        run.report(folder, page=False, **options)
        for number, size in enumerate(sizes, 1):
            model(torch.randn(size, *shape)).square().mean().backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model(torch.randn(100, *shape))  # a validation is not training
    return read_record(folder)


def test_uneven_batches_are_counted_as_they_are(tmp_path: Path) -> None:
    found = loop(tmp_path, [8, 8, 3])
    assert found.rows[-1]["samples"] == 19
    assert found.rows[-1]["flops/training"] == 2 * 19 * 330
    assert found.run.batch == 8


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    found = loop(tmp_path, [4] * 8, accumulate=2)
    assert found.rows[-1]["step"] == 4
    assert found.rows[-1]["samples"] == 32
    assert found.rows[-1]["flops/training"] == 2 * 32 * 330
    assert found.rows[-1]["flops/inference"] == 2 * 110
    assert found.run.batch == 8


def test_a_step_that_a_scaler_skips_has_cost_what_it_cost(tmp_path: Path) -> None:
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with sparsify(Static(0.9, distribution="uniform", print_plan=False), model, optimizer, steps=6) as run:
        run.report(tmp_path, page=False)
        for number in range(6):
            model(torch.randn(BATCH, *shape)).square().mean().backward()
            if number not in (2, 4):  # as a GradScaler leaves a step out
                optimizer.step()
            optimizer.zero_grad()
    last = read_record(tmp_path).rows[-1]
    assert last["step"] == 4
    assert last["flops/training"] == 2 * 6 * BATCH * 330


@pytest.mark.parametrize("form", FORMS)
def test_both_passes_of_an_optimizer_that_takes_two_are_counted(tmp_path: Path, form: str) -> None:
    model, shape = network("mlp")
    make, step = FORMS[form]
    optimizer = make(model.parameters(), lr=0.01)
    with sparsify(Static(0.9, distribution="uniform", print_plan=False), model, optimizer, steps=3) as run:
        run.report(tmp_path, page=False)
        for size in (8, 8, 3):
            x = torch.randn(size, *shape)

            def backward(x: Tensor = x) -> Tensor:
                loss = model(x).square().mean()
                loss.backward()
                return loss

            step(optimizer, backward)
    last = read_record(tmp_path).rows[-1]
    assert last["samples"] == 19
    assert last["flops/inference"] == 2 * 110
    assert last["flops/training"] == 2 * 19 * 2 * 330


def test_two_optimizers_of_one_batch_are_one_window(tmp_path: Path) -> None:
    model, shape = network("mlp")
    optimizers = [torch.optim.SGD(layer.parameters(), 0.01) for layer in (model.fc1, model.fc2)]  # type: ignore[union-attr]
    method = RigL(
        0.9, every=3, start=3, stop=1000, drop_fraction="constant(0.3)", distribution="uniform", print_plan=False
    )
    with sparsify(method, model, optimizers, steps=STEPS) as run:
        run.report(tmp_path, page=False)
        for _ in range(STEPS):
            model(torch.randn(BATCH, *shape)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    last = read_record(tmp_path).rows[-1]
    assert (last["step"], last["samples"]) == (STEPS, BATCH * STEPS)
    assert last["flops/training"] == 2 * BATCH * TOTALS["mlp"]["rigl"]


def test_a_compiled_model_costs_the_same(tmp_path: Path) -> None:
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    compiled = torch.compile(model, backend="eager")
    with sparsify(Static(0.9, distribution="uniform", print_plan=False), compiled, optimizer, steps=3) as run:
        run.report(tmp_path, page=False)
        for size in (8, 8, 3):
            compiled(torch.randn(size, *shape)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    last = read_record(tmp_path).rows[-1]
    assert last["samples"] == 19
    assert last["flops/training"] == 2 * 19 * 330


# ---------------------------------------------------------------------- rows and files


def test_a_row_is_written_at_the_start_at_updates_between_them_and_at_the_end(tmp_path: Path) -> None:
    model, shape = network("mlp")
    method = SET(0.9, every=3, distribution="uniform", print_plan=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with sparsify(method, model, optimizer, steps=16, epoch=8) as run:
        run.report(tmp_path, every=4, page=False, title="a title")
        for number in range(1, 17):
            model(torch.randn(BATCH, *shape)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 8:
                run.epoch_end({"val/acc": 0.5})
    found = read_record(tmp_path)
    events = [(row["step"], row["event"]) for row in found.rows]
    assert (events[0], events[-1]) == ((0, "start"), (16, "end"))
    assert {(8, "validation"), (12, "update"), (16, "log")} <= set(events)
    assert all(b - a >= 4 for (a, x), (b, y) in pairwise(events) if x == y == "update")
    validation = next(row for row in found.rows if row["event"] == "validation")
    assert (validation["val/acc"], validation["epoch"]) == (0.5, 1.0)
    assert found.rows[-1]["epoch"] == 2.0
    assert all(("layers" in row) == (row["event"] != "log") for row in found.rows)
    assert set(found.masks) == {"fc1.weight", "fc2.weight"}
    assert torch.equal(found.masks["fc1.weight"]["last"], method.masks["fc1.weight"])
    assert int(found.masks["fc1.weight"]["first"].sum()) == 70
    run_said = found.run
    assert (run_said.method, run_said.status, run_said.length, run_said.title) == ("SET", "finished", 16, "a title")
    assert (run_said.chain, run_said.calendar["every"]) == (["fc1.weight", "fc2.weight"], 3)
    assert {layer.name: layer.positions for layer in run_said.layers}["fc1.bias"] == 0
    assert found.rows[0]["bytes/weights"] == 4 * sum(p.numel() for p in model.parameters())


class Given(Static):
    """Takes the masks that it is given, after these steps."""

    later: dict[int, dict[str, Tensor]]

    def after_step(self, step: Step) -> Update | None:
        masks = self.later.get(step.number)
        return None if masks is None else Update(masks)


MASKS = [
    [["010", "010", "111", "001"], ["0000", "0010", "1000", "1111"], ["0110", "0100"]],
    [["011", "110", "010", "001"], ["0000", "1010", "0100", "1011"], ["1010", "1000"]],
    [["110", "110", "010", "000"], ["0000", "1010", "1100", "0001"], ["0010", "0100"]],
    [["111", "100", "010", "010"], ["0000", "1010", "1100", "1010"], ["1110", "0000"]],
]
TOPOLOGY = {
    "topology/churn": [None, 0.4, 0.25, 0.4],
    "topology/distance_previous": [None, 0.5714285714, 0.5, 0.5],
    "topology/distance_first": [0.0, 0.5714285714, 0.5789473684, 0.6363636364],
    "topology/ever_active": [0.4166666667, 0.5833333333, 0.6111111111, 0.6388888889],
    "topology/mean_age": [0.0, 60.0, 125.0, 133.3333333333],
    "topology/dead_units": [2, 3, 3, 3],
    "topology/paths": [7, 2, 7, 8],
}


def test_topology_is_what_was_worked_by_hand(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    names = ["0.weight", "2.weight", "4.weight"]
    given = [
        {n: torch.tensor([[c == "1" for c in row] for row in rows]) for n, rows in zip(names, layers, strict=True)}
        for layers in MASKS
    ]
    with torch.no_grad():
        for name, mask in given[0].items():
            model.get_parameter(name).copy_(torch.where(mask, 1.0, 0.0))
    method = Given(initial_mask="nonzero", print_plan=False)
    method.later = {100 * i: masks for i, masks in enumerate(given) if i}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with sparsify(method, model, optimizer, steps=300) as run:
        run.report(tmp_path, every=100, page=False)
        for _ in range(300):
            model(torch.randn(2, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    rows = [row for row in read_record(tmp_path).rows if row["event"] in ("start", "update")]
    assert [row["step"] for row in rows] == [0, 100, 200, 300]
    for key, expected in TOPOLOGY.items():
        assert [row[key] for row in rows] == [v if v is None else pytest.approx(v) for v in expected], key
    assert [row["layers"]["0.weight"]["on_no_path"] for row in rows] == [2, 3, 1, 1]
    assert [row["layers"]["2.weight"]["on_no_path"] for row in rows] == [2, 3, 2, 2]


def test_a_run_without_an_end_keeps_the_rows_so_far(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), three_steps(tmp_path):
        raise ZeroDivisionError
    found = read_record(tmp_path)
    assert found.run.status == "failed"
    assert [row["event"] for row in found.rows] == ["start", "log"]
    with pytest.raises(KeyboardInterrupt), three_steps(tmp_path):
        raise KeyboardInterrupt
    assert read_record(tmp_path).run.status == "stopped"


@contextmanager
def three_steps(folder: Path, planned: int = 10, every: int = 2) -> Iterator[None]:
    """A recorded run that is left after three of its steps."""
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with sparsify(Static(0.9, print_plan=False), model, optimizer, steps=planned) as run:
        run.report(folder, every=every, page=False)
        for _ in range(3):
            model(torch.randn(BATCH, *shape)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


# ---------------------------------------------------------------------- resume


def halves(folder: Path, stop: int | None, state: Any = None, weights: Any = None, steps: int = 20) -> Any:
    """A run of 20 steps up to ``stop``, or one that goes on; gives the state of the run and of its weights."""
    model, shape = network("conv")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if weights is not None:
        model.load_state_dict(weights[0])
        optimizer.load_state_dict(weights[1])
    method = RigL(0.9, every=3, distribution="uniform", print_plan=False)
    run = sparsify(method, model, optimizer, steps=steps, epoch=5, state=state)
    run.report(folder, every=4, page=False)
    begin = 0 if weights is None else weights[2]
    for number in range(begin + 1, (stop or steps) + 1):
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(BATCH, *shape, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 5 == 0:
            run.epoch_end({"val/loss": float(number)})
    if stop is None:
        run.close()
        return None
    kept = run.state_dict()
    file = folder.parent / "state.pt"
    torch.save(kept, file)
    return torch.load(file, weights_only=True), (model.state_dict(), optimizer.state_dict(), stop)


@pytest.mark.combinations
@pytest.mark.parametrize("stop", [5, 9, 13])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_record_is_that_of_a_run_without_a_stop(tmp_path: Path, stop: int, elsewhere: bool) -> None:
    halves(tmp_path / "whole", None)
    state, weights = halves(tmp_path / "first", stop)
    # the process went on for a while after its last checkpoint
    (tmp_path / "first/record/rows.jsonl").open("a").write(json.dumps({"step": stop + 3, "event": "log"}) + "\n")
    place = tmp_path / ("second" if elsewhere else "first")
    halves(place, None, state, weights)
    whole, resumed = read_record(tmp_path / "whole"), read_record(place)
    for one, other in zip(timeless(resumed.rows), timeless(whole.rows), strict=True):
        assert one == other
    assert resumed.rows[-1]["seconds"] > 0
    assert (resumed.run.layers, resumed.run.batch, resumed.run.chain) == (
        whole.run.layers,
        whole.run.batch,
        whole.run.chain,
    )
    for name, pair in whole.masks.items():
        assert all(torch.equal(mask, resumed.masks[name][time]) for time, mask in pair.items())


def test_a_state_of_a_run_that_nobody_recorded_loads(tmp_path: Path) -> None:
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    method = Static(0.9, print_plan=False)
    run = sparsify(method, model, optimizer, steps=6)
    assert "record" not in run.state_dict()
    model(torch.randn(BATCH, *shape)).square().mean().backward()
    optimizer.step()
    state = run.state_dict()
    run.close()
    again = sparsify(Static(0.9, print_plan=False), model, optimizer, steps=6, state=state)
    again.report(tmp_path, page=False)
    model(torch.randn(BATCH, *shape)).square().mean().backward()
    optimizer.step()
    again.close()
    assert read_record(tmp_path).rows[-1]["samples"] == BATCH


def test_a_state_is_loaded_after_the_record_was_asked_for(tmp_path: Path) -> None:
    halves(tmp_path / "whole", None)
    state, (weights, momentum, stop) = halves(tmp_path / "first", 9)
    model, shape = network("conv")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    run = sparsify(RigL(0.9, every=3, distribution="uniform", print_plan=False), model, optimizer, steps=20, epoch=5)
    run.report(tmp_path / "first", every=4, page=False)
    model.load_state_dict(weights)
    optimizer.load_state_dict(momentum)
    run.load_state_dict(state)
    for number in range(stop + 1, 21):
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(BATCH, *shape, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 5 == 0:
            run.epoch_end({"val/loss": float(number)})
    run.close()
    found, whole = read_record(tmp_path / "first"), read_record(tmp_path / "whole")
    assert found.rows[-1]["flops/training"] == whole.rows[-1]["flops/training"]


# ---------------------------------------------------------------------- what is refused, and what is not lost


def test_a_record_begins_before_the_first_step(tmp_path: Path) -> None:
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = sparsify(Static(0.9, print_plan=False), model, optimizer, steps=6)
    model(torch.randn(BATCH, *shape)).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="report\\(\\) comes too late"):
        run.report(tmp_path)
    run.close()
    with pytest.raises(RuntimeError, match="closed"):
        run.report(tmp_path)


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    model, _ = network("mlp")
    run = sparsify(Static(0.9, print_plan=False), model, torch.optim.SGD(model.parameters(), 0.01), steps=6)
    with pytest.raises(ValueError, match="every=0 is not a number of optimizer steps"):
        run.report(tmp_path, every=0)
    with pytest.raises(FileNotFoundError, match=r"dense=.* holds no record"):
        run.report(tmp_path, dense=tmp_path / "dense")
    assert not has_record(tmp_path)
    run.close()


def test_a_run_has_one_record(tmp_path: Path) -> None:
    model, _ = network("mlp")
    run = sparsify(Static(0.9, print_plan=False), model, torch.optim.SGD(model.parameters(), 0.01), steps=6)
    assert run.report(tmp_path / "one", page=False) == tmp_path / "one" / "report.html"
    with pytest.raises(RuntimeError, match="is recorded in"):
        run.report(tmp_path / "two")
    run.close()


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparse_callbacks.core.record.row_file.append_rows", full)
    with (
        pytest.warns(UserWarning, match="No space left on device.*training goes on") as caught,
        three_steps(tmp_path, planned=3, every=1),
    ):
        pass
    assert len([w for w in caught if "record of this run" in str(w.message)]) == 1


def test_a_page_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Path:
        raise ValueError("no ink")

    monkeypatch.setattr("sparse_callbacks.core.record.page.write_page", fails)
    monkeypatch.setattr("sparse_callbacks.core.record.loop_record.why_no_page", lambda: "")
    model, _ = network("mlp")
    run = sparsify(Static(0.9, print_plan=False), model, torch.optim.SGD(model.parameters(), 0.01), steps=6)
    run.report(tmp_path)
    with pytest.warns(
        UserWarning, match=r"report.html was not written \(ValueError: no ink\).*sparse_callbacks.report"
    ):
        run.close()


def test_a_record_can_be_read_as_json_whatever_was_measured(tmp_path: Path) -> None:
    model, shape = network("mlp")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with sparsify(Static(0.9, print_plan=False), model, optimizer, steps=6) as run:
        run.report(tmp_path, page=False)
        model(torch.randn(BATCH, *shape)).square().mean().backward()
        optimizer.step()
        run.epoch_end({"val/loss": math.nan, "val/inf": torch.tensor(math.inf)})
    row = next(row for row in read_record(tmp_path).rows if row["event"] == "validation")
    assert (row["val/loss"], row["val/inf"]) == (None, None)
