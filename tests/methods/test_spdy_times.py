"""Tables of times for Spdy: the file, what it costs, how it is measured, and the command that does it."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import Spdy
from sparse_callbacks.core.selection import select
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.methods.spdy.command import main
from sparse_callbacks.methods.spdy.levels import LEVELS
from sparse_callbacks.methods.spdy.time_table import TimeTable
from sparse_callbacks.methods.spdy.timing import measured_times


class Mixed(nn.Sequential):
    """A convolution, a linear layer that sees several rows of a sample, and one that sees one."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(36, 50), nn.Flatten(), nn.Linear(200, 10))


def by_values(calls: Sequence[Callable[[], Any]], readings: int, **_: Any) -> list[float]:
    """A step takes as many milliseconds as its layer holds values, times the rows that it sees."""
    found = []
    for call in calls:
        call()  # it must run
        inside = {type(c.cell_contents): c.cell_contents for c in call.__closure__ or ()}
        layer = next((v for v in inside.values() if isinstance(v, nn.Module)), None)
        assert layer is not None
        batch = next((v for v in inside.values() if isinstance(v, Tensor)), torch.empty(1, 1))
        weight = layer.values if isinstance(layer, SparseLinear) else layer.weight
        found.append(float(weight.numel() * len(batch)))  # type: ignore[operator]
    return found


# ---------------------------------------------------------------------- the file


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = TimeTable({"model": "mine", "torch": "0"}, {"a.weight": {0.0: 4.0, 1 / 3: 2.5}, "b.weight": {0.0: 1.0}})
    path = tmp_path / "t.json"
    table.save(path)
    assert TimeTable.load(path) == table
    assert json.loads(path.read_text())["ms"] == {
        "a.weight": {"0.0": 4.0, "0.3333333333333333": 2.5},
        "b.weight": {"0.0": 1.0},
    }
    assert any("was measured with torch 0" in text for text in table.doubts(path))


def test_layers_are_found_under_a_prefix_and_others_cost_what_they_do() -> None:
    table = TimeTable({}, {"0.weight": {0.9: 1.0, 0.0: 4.0, 0.5: 3.0}, "2.weight": {0.0: 2.0}, "4.weight": {0.0: 8.0}})
    net = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))})
    costs = table.costs(select(net, exclude=("net.4*",)))
    assert costs.levels == {"net.0.weight": (0.0, 0.5, 0.9), "net.2.weight": (0.0,)}
    assert costs.costs == {"net.0.weight": (4.0, 3.0, 1.0), "net.2.weight": (2.0,)}
    assert (costs.others, costs.dense) == (8.0, 14.0)
    with pytest.raises(ValueError, match=r"no layer for 2\.weight\. It has 0\.weight\. Measure this model: python -m"):
        TimeTable({}, {"0.weight": {0.0: 1.0}}).costs(
            select(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
        )
    with pytest.raises(ValueError, match=r"no layer for net\.0\.weight, net\.2\.weight, net\.4\.weight\. It has fc"):
        TimeTable({}, {"fc.weight": {0.0: 1.0}}).costs(select(net))


BAD = {
    "no file": (None, "FileNotFoundError"),
    "no JSON": ("{", "JSONDecodeError"),
    "no times": ('{"version": 1}', 'it has no "ms"'),
    "another version": ('{"version": 9, "ms": {"a": {"0": 1}}}', "it is one of version 9"),
    "a list": ('{"ms": {"a": [1, 2]}}', r"ms of a is \[1, 2\] and not milliseconds by sparsity"),
    "a word": ('{"ms": {"a": {"dense": 1}}}', "ms of a has a sparsity that is no number"),
    "not dense": ('{"ms": {"a": {"0.5": 1}}}', r"the sparsities of a are 0\.5, and must be different"),
    "twice": ('{"ms": {"a": {"0": 1, "0.0": 1}}}', r"the sparsities of a are 0, 0\.0"),
    "all zeros": ('{"ms": {"a": {"0": 1, "1": 1}}}', r"the sparsities of a are 0, 1"),
    "a negative time": ('{"ms": {"a": {"0": -1}}}', "a time of a is -1 and not a number of milliseconds"),
    "no time at all": ('{"ms": {"a": {"0": 0}, "b": {"0": 0}}}', "its dense layers take 0 milliseconds together"),
    "an endless time": ('{"ms": {"a": {"0": 1e308}, "b": {"0": 1e308}}}', "its dense layers take inf milliseconds"),
    "about": ('{"about": [], "ms": {"a": {"0": 1}}}', r"about in it is \[\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_refused(kind: str, tmp_path: Path) -> None:
    text, said = BAD[kind]
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"cost='.*t\.json' is not a table of times \(.*{said}"):
        Spdy(cost=str(path)).shares(Mixed(), select(Mixed()))


# ---------------------------------------------------------------------- measured


def test_what_is_measured_of_each_layer() -> None:
    lines: list[str] = []
    net = Mixed()
    state = torch.get_rng_state()
    table = measured_times(net, "mixed", 8, (1, 8, 8), measure=by_values, report=lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert [*table.ms] == ["0.weight", "2.weight", "4.weight"]
    assert all(tuple(ms) == LEVELS for ms in table.ms.values())
    assert set(table.ms["0.weight"].values()) == {36.0}  # a convolution keeps its dense time
    # 8 samples: 4 rows each in the first linear layer, 1 in the second
    for name, rows, shape in (("2.weight", 32, (50, 36)), ("4.weight", 8, (10, 200))):
        ms = table.ms[name]
        assert ms[0.0] == rows * shape[0] * shape[1]
        assert ms[0.99] == pytest.approx(rows * shape[0] * max(1, round(0.01 * shape[1])), rel=0.3)
        assert ms[LEVELS[1]] == pytest.approx(0.6 * ms[0.0], rel=0.1)
    assert lines[0] == "0.weight 4x1x3x3: 36 ms, dense at every level"
    assert re.fullmatch(r"2\.weight 50x36: 5\.76e\+04 ms dense, .* ms at 0\.4, .* ms at 0\.99", lines[1])
    assert (table.about["model"], table.about["batch"], table.about["input"]) == ("mixed", 8, [1, 8, 8])


class Idle(nn.Sequential):
    """Of its layers only the first is called."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self[0](x)
        return found


def test_layers_that_no_pass_calls_have_no_time() -> None:
    lines: list[str] = []
    table = measured_times(Idle(), "idle", 2, (6,), measure=by_values, report=lines.append)
    assert [*table.ms] == ["0.weight"]
    assert lines[1] == "1.weight: not timed, as a forward pass in eval mode does not call its layer"
    with pytest.raises(ValueError, match=r"has no layer for 1\.weight.*exclude="):
        table.costs(select(Idle()))
    assert [*table.costs(select(Idle(), None, ("1.*",))).costs] == ["0.weight"]

    class Unused(Idle):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="of Unused in eval mode calls none of the layers that could become sparse"):
        measured_times(Unused(), "unused", 2, (6,), measure=by_values)


def test_attention_and_recurrent_layers_have_their_dense_time() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.rnn(self.attention(x, x, x)[0])[0]
            return found

    def one(calls: Sequence[Callable[[], Any]], readings: int, **_: Any) -> list[float]:
        for call in calls:
            call()
        return [12.0] * len(calls)

    ms = measured_times(Tokens(), "s", 2, (5, 8), measure=one).ms
    assert len(ms) == 3 + 1 + 2 * 3
    assert all(len(set(times.values())) == 1 for times in ms.values())
    # a module's time once, in proportion to its weights: 3/4 and 1/4, and 2/3 and 1/3
    assert sum(t[0.0] for t in ms.values()) == pytest.approx(24.0, rel=1e-5)
    assert ms["attention.out_proj.weight"][0.0] == pytest.approx(3.0)
    assert ms["rnn.weight_ih_l0[0]"][0.0] == pytest.approx(12 * 32 / 144, rel=1e-5)


# ---------------------------------------------------------------------- the command


MIXED = ["test_spdy_times:Mixed", "--input", "1x8x8"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main([*MIXED, *words])
    return capsys.readouterr().out.splitlines()


def test_the_command_prints_the_share_of_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "--budget", "0.4")
    torch.manual_seed(0)
    net = Mixed()
    found = Spdy(0.4, input=(1, 8, 8)).layer_shares(net, select(net))
    assert [line.split()[0] for line in lines[1:4]] == ["0.weight", "2.weight", "4.weight"]
    assert [line.split()[2] for line in lines[1:4]] == [f"{s:.4f}" for s in found.sparsities.values()]
    assert lines[-1].startswith("FLOPs: ")
    assert lines[-1].endswith(f"a share of {found.reached:.4f} (budget 0.4)")
    assert found.reached <= 0.4
    assert run(capsys, "--budget", "0.4") == lines  # the same model each time
    main([MIXED[0], "--input", "1", "8", "8", "--budget", "0.4"])
    assert capsys.readouterr().out.splitlines() == lines


def test_the_command_leaves_layers_out(capsys: pytest.CaptureFixture[str]) -> None:
    net = Mixed()
    for words, dense in (
        (["--exclude", "0.*", "4.*"], ["0.weight", "4.weight"]),
        (["--keep-dense", "last"], ["4.weight"]),
    ):
        lines = run(capsys, "--budget", "0.6", *words)
        shown = [line.split()[0] for line in lines]
        assert [n for n in ("0.weight", "2.weight", "4.weight") if n not in shown] == dense
        assert lines[-2].startswith("everything else")
    shares = Spdy(0.6, input=(1, 8, 8)).shares(net, select(net, None, ("0.*", "4.*")))
    assert [*shares] == ["2.weight"]


def test_the_command_writes_the_table_that_cost_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sparse_callbacks.methods.spdy.command.measured_times",
        lambda *given, **more: measured_times(*given, **(more | {"measure": by_values})),
    )
    out = tmp_path / "new" / "t.json"
    lines = run(capsys, "--budget", "0.5", "--measure", "--out", str(out), "--batch", "4")
    assert f"times of 3 layers in {out}" in lines
    total = sum(ms[0.0] for ms in TimeTable.load(out).ms.values())
    assert lines[-1].startswith("milliseconds of the table: ")
    assert f"of {total:.6g}, a share of 0." in lines[-1]
    assert run(capsys, "--budget", "0.5", "--cost", str(out)) == lines[4:]
    monkeypatch.chdir(tmp_path)
    assert "times of 3 layers in Mixed_times.json" in run(capsys, "--budget", "0.5", "--measure", "--batch", "4")
    assert TimeTable.load("Mixed_times.json").ms == TimeTable.load(out).ms
    net = Mixed()
    shares = Spdy(0.5, str(out)).shares(nn.ModuleDict({"net": net}), select(nn.ModuleDict({"net": net})))
    assert shares["net.0.weight"] == 0.0  # it would save nothing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "t.json"], "--out takes the times that --measure finds: give both"),
        (["--measure", "--out", "t.json", "--cost", "u.json"], "give one of them"),
        (["--budget", "2"], "budget=2.0 is out of range"),
        (["--budget", "0.0001"], "cannot be met"),
        (["--exclude", "nothing*"], "matches no"),
        (["--cost", "none.json"], "is not a table of times"),
        (["--input", "1xa"], "'a' is not a whole number from 1 on"),
        (["--input", "3x8x8"], "the model fails with a float tensor of size [1, 3, 8, 8]"),
    ],
    ids=[
        "no measure",
        "two tables",
        "budget",
        "too little",
        "no such layer",
        "no table",
        "size",
        "another size",
    ],
)
def test_words_that_cannot_work_together(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*MIXED, *words])
    assert said in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]
