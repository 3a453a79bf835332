"""Latency tables: lookup, rounding up, interpolation, doubts, refusals, and their files."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.smcp import FALLBACK
from support.latency_rig import Net, by_weights

from sparse_callbacks.channels.costs import Layer, layers
from sparse_callbacks.channels.latency import table
from sparse_callbacks.channels.latency.measure import measure, settings
from sparse_callbacks.channels.latency.table import Grid, Table, signature
from sparse_callbacks.core import machine

# ---------------------------------------------------------------------- lookup


@pytest.mark.parametrize("channels", FALLBACK)
def test_the_first_that_was_measured_is_taken_in_the_published_order(channels: tuple[int, int]) -> None:
    keys = FALLBACK[channels]
    tables = [of for n in range(1, len(keys) + 1) for of in itertools.combinations(keys, n)]
    whole = [
        of for of in tables if len(of) == len({i for i, _ in of}) * len({o for _, o in of})
    ]  # what a grid can hold
    assert len(whole) >= 2 * len(keys) - 1
    for measured in whole:
        ins, outs = (sorted({m[d] for m in measured}) for d in (0, 1))
        grid = Grid(ins, outs, [[float(keys.index((i, o))) for o in outs] for i in ins])
        first = keys.index(measured[0])
        assert grid.look_up(*channels) == (first, "rounded up" if first else "measured")


def test_a_number_is_rounded_up_only_past_what_was_not_measured() -> None:
    grid = Grid([1, 4, 8, 12, 16], [32], [[1.0], [4.0], [8.0], [12.0], [16.0]])
    assert [grid.look_up(n, 32) for n in (9, 11, 12)] == [(9, "interpolated"), (11, "interpolated"), (12, "measured")]
    assert [grid.look_up(n, 32) for n in (13, 15, 16, 7)] == [
        (16, "rounded up"),
        (16, "rounded up"),
        (16, "measured"),
        (8, "rounded up"),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_more_channels_never_take_less_time_where_none_measured_did(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ins, outs = (sorted({1, *torch.randint(2, 41, (4,), generator=draw).tolist()}) for _ in range(2))
    ms = torch.rand(len(ins), len(outs), generator=draw).cumsum(0).cumsum(1).tolist()
    grid = Grid(ins, outs, ms)
    found = torch.tensor(
        [[grid(i, o) for o in range(1, outs[-1] + 1)] for i in range(1, ins[-1] + 1)], dtype=torch.float64
    )
    assert (found.diff(dim=0) >= -1e-12).all()  # interpolation rounds
    assert (found.diff(dim=1) >= -1e-12).all()


def test_between_measured_numbers_the_time_is_interpolated() -> None:
    grid = Grid([10, 20], [1, 5], [[1.0, 2.0], [3.0, 6.0]])
    assert grid(10, 1) == 1.0
    assert grid(20, 5) == 6.0
    assert grid(15, 1) == 2.0
    assert grid(10, 2) == 1.25
    assert grid(15, 3) == pytest.approx((1 + 2 + 3 + 6) / 4)


@pytest.mark.parametrize(
    ("channels", "why"), [((4, 2), "4 inputs lie outside of"), ((12, 9), "9 outputs lie outside of the 1 to 5")]
)
def test_what_lies_outside_is_refused(channels: tuple[int, int], why: str) -> None:
    with pytest.raises(LookupError, match=why):
        Grid([10, 20], [1, 5], [[1.0, 2.0], [3.0, 6.0]])(*channels)


def test_a_depthwise_layer_has_one_axis() -> None:
    grid = Grid([2, 6], [4, 12], [[1.0], [3.0]])
    assert [grid(2, 4), grid(4, 8), grid(6, 12)] == [1.0, 2.0, 3.0]


def test_a_table_adds_up_the_uses_of_a_layer() -> None:
    layer = Layer("conv", 4, 4, (3, 3), settings="stride 1x1", maps=((1, 8, 8), (1, 4, 4)), positions=(64, 16))
    times = zip(layer.maps, (4.0, 1.0), strict=True)
    grids = {signature(layer, inner): Grid([1, 4], [1, 4], [[0.0, 0.0], [0.0, ms]]) for inner, ms in times}
    assert Table({}, grids)(layer, 4, 4) == 5.0


def test_a_layer_takes_longer_in_the_model_by_a_factor() -> None:
    table = Table({}, {"linear map 1": Grid([1, 4], [1, 4], [[1.0, 4.0], [4.0, 16.0]])}, constant=7.0, factor=1.5)
    assert table(Layer("fc", 4, 4), 4, 1) == 6.0  # what is not a layer comes once, not with each


def test_a_table_tells_how_its_numbers_were_found() -> None:
    table = Table({}, {"linear map 1": Grid([4, 16], [4], [[4.0], [16.0]])}, constant=7.0, factor=1.5)
    for inputs in (4, 16, 15, 14, 13, 6, 6, 4):
        table(Layer("fc", 16, 4), inputs, 4)
    assert table.lookups == {"measured": 2, "rounded up": 3, "interpolated": 1}
    assert (
        table.lookup_report()
        == "of 6 sizes of layers looked up in the latency table: 2 measured, 3 rounded up, 1 interpolated"
    )


# ---------------------------------------------------------------------- is it a table for here?


def test_a_table_measured_here_is_not_doubtful() -> None:
    about = settings("net", 2, [3, 9, 9], 4, 15, "cpu", False)
    assert Table(about, {}).doubts((3, 9, 9)) == []
    assert Table({}, {}).doubts((3, 9, 9)) == []  # one made by hand, that tells nothing


@pytest.mark.parametrize(
    ("was", "said"),
    [
        ({"machine": "Windows ARM64"}, "the latency table of net was measured on Windows ARM64, and here it is "),
        ({"device": "cpu Abacus"}, "the latency table of net was measured on cpu Abacus, and here it is cpu "),
        (
            {"device": "cuda:0 Tesla V100"},
            "the latency table of net was measured on cuda:0 Tesla V100, and here it is cuda:0 ",
        ),
        (
            {"threads": 99},
            f"the latency table of net was measured with 99 threads, and here it is {torch.get_num_threads()}.",
        ),
        (
            {"torch": "1.0"},
            f"the latency table of net was measured with torch 1.0, and here it is {torch.__version__}.",
        ),
    ],
)
def test_a_table_measured_elsewhere_is_doubtful(was: dict[str, Any], said: str) -> None:
    about = settings("net", 2, [3, 9, 9], 4, 15, "cpu", False) | was
    [warning] = Table(about, {}).doubts([3, 9, 9])
    assert warning.startswith(said)
    assert warning.endswith("Times may differ: measure where the model is to be fast.")


def test_a_fit_that_is_far_off_is_told() -> None:
    [doubt] = Table({"model": "net", "off": 0.28}, {}).doubts((3,))
    assert doubt.startswith(
        "the latency table of net is off by up to 28 % at the models that it was fitted to. Measure anew on a quiet"
    )
    assert Table({"model": "net", "off": 0.09}, {}).doubts((3,)) == []


def test_threads_do_not_matter_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Chip {device}")
    about = settings("net", 2, [3], 4, 15, "cuda:1", False) | {"threads": 99}
    assert about["device"] == "cuda:1 Chip cuda:1"
    assert Table(about, {}).doubts([3]) == []


def test_the_processor_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "info").write_text("vendor_id : A\nmodel name\t: Abacus 3000: fast\nmodel name\t: Other\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "info")
    assert table.environment("cpu")["device"] == "cpu Abacus 3000: fast"
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert table.environment("cpu")["device"] == "cpu arm"


def test_a_table_of_other_inputs_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"of net is of inputs of size \[3, 9, 9\], and here they are \[3, 8, 8\]\. Measure anew: python",
    ):
        Table({"model": "net", "input": [3, 9, 9]}, {}).doubts((3, 8, 8))


def test_an_unfinished_table_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"measuring the latency table of net was interrupted\. Run the same command again"
    ):
        Table({"model": "net", "input": [3], "finished": False}, {}).doubts((3,))


# ---------------------------------------------------------------------- files


def test_a_table_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    table = measure(Net(), "net", 1, [3, 9, 9], points=2)
    table.save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json") == table
    other = replace(table, constant=0.5, factor=1.25)
    other.save(tmp_path / "t.json")
    found = Table.load(tmp_path / "t.json")
    assert (found.constant, found.factor, found.grids) == (0.5, 1.25, table.grids)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


OLD = json.dumps({"version": 1, "about": {}, "grids": {}, "constant": 0, "factor": 1})
UNKNOWN = json.dumps({"version": 2, "about": {}, "grids": {"a": {"b": 1}}, "constant": 0, "factor": 1})


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(
        ValueError, match=r"is not a latency table of version 2 \(FileNotFoundError.*Measure one: python -m sparse"
    ):
        Table.load(path)
    for content in ("nothing", "[]", "{}", OLD, UNKNOWN):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is not a latency table of version 2 \("):
            Table.load(path)


def test_a_layer_that_the_table_does_not_cover_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    net = Net()
    table = measure(net, "net", 1, [3, 9, 9], points=2)
    other = layers(net, torch.zeros(1, 3, 11, 11))["c"]
    with pytest.raises(
        ValueError,
        match=r"of net \(input \[3, 9, 9\]\) does not cover c with 8 inputs and 12 outputs: no 'conv .*11x11'",
    ):
        table(other, 8, 12)
    with pytest.raises(ValueError, match=r"does not cover c with 40 inputs and 12 outputs: 40 inputs lie outside"):
        table(layers(net, torch.zeros(1, 3, 9, 9))["c"], 40, 12)
