"""Latency tables: lookup, interpolation, refusals, JSON, measuring, the command line. Times are set by a rule, not by a clock."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.smcp import FALLBACK
from torch import nn

from sparse_callbacks.channels.costs import Layer, Network, flops, layers
from sparse_callbacks.channels.latency import command, fit, probes, table
from sparse_callbacks.channels.latency.command import main, measure, settings
from sparse_callbacks.channels.latency.fit import fitted, kept, shrunk, smaller
from sparse_callbacks.channels.latency.probes import axis, milliseconds, probe
from sparse_callbacks.channels.latency.table import Grid, Table, signature
from sparse_callbacks.channels.slim import slimmable_groups

# ---------------------------------------------------------------------- lookup


@pytest.mark.parametrize("channels", FALLBACK)
def test_the_first_that_was_measured_is_taken_in_the_published_order(channels: tuple[int, int]) -> None:
    keys = FALLBACK[channels]
    tables = [of for n in range(1, len(keys) + 1) for of in itertools.combinations(keys, n)]
    whole = [of for of in tables if len(of) == len({i for i, _ in of}) * len({o for _, o in of})]  # what a grid can hold
    assert len(whole) >= 2 * len(keys) - 1
    for measured in whole:
        ins, outs = (sorted({m[d] for m in measured}) for d in (0, 1))
        grid = Grid(ins, outs, [[float(keys.index((i, o))) for o in outs] for i in ins])
        first = keys.index(measured[0])
        assert grid.look(*channels) == (first, "rounded up" if first else "measured")


def test_a_number_is_rounded_up_only_past_what_was_not_measured() -> None:
    grid = Grid([1, 4, 8, 12, 16], [32], [[1.0], [4.0], [8.0], [12.0], [16.0]])
    assert [grid.look(n, 32) for n in (9, 11, 12)] == [(9, "interpolated"), (11, "interpolated"), (12, "measured")]
    assert [grid.look(n, 32) for n in (13, 15, 16, 7)] == [(16, "rounded up"), (16, "rounded up"), (16, "measured"), (8, "rounded up")]


@pytest.mark.parametrize("seed", range(20))
def test_more_channels_never_take_less_time_where_none_measured_did(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    ins, outs = (sorted({1, *torch.randint(2, 41, (4,), generator=draw).tolist()}) for _ in range(2))
    ms = torch.rand(len(ins), len(outs), generator=draw).cumsum(0).cumsum(1).tolist()
    grid = Grid(ins, outs, ms)
    found = torch.tensor([[grid(i, o) for o in range(1, outs[-1] + 1)] for i in range(1, ins[-1] + 1)], dtype=torch.float64)
    assert (found.diff(dim=0) >= -1e-12).all()  # interpolation rounds
    assert (found.diff(dim=1) >= -1e-12).all()


def test_between_measured_numbers_the_time_is_interpolated() -> None:
    grid = Grid([10, 20], [1, 5], [[1.0, 2.0], [3.0, 6.0]])
    assert grid(10, 1) == 1.0
    assert grid(20, 5) == 6.0
    assert grid(15, 1) == 2.0
    assert grid(10, 2) == 1.25
    assert grid(15, 3) == pytest.approx((1 + 2 + 3 + 6) / 4)


@pytest.mark.parametrize(("channels", "why"), [((4, 2), "4 inputs lie outside of"), ((12, 9), "9 outputs lie outside of the 1 to 5")])
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
    assert table(Layer("fc", 4, 4), 4, 1) == 6.0  # what is no layer comes once, not with each


def test_a_table_tells_how_its_numbers_were_found() -> None:
    table = Table({}, {"linear map 1": Grid([4, 16], [4], [[4.0], [16.0]])}, constant=7.0, factor=1.5)
    for inputs in (4, 16, 15, 14, 13, 6, 6, 4):
        table(Layer("fc", 16, 4), inputs, 4)
    assert table.lookups == {"measured": 2, "rounded up": 3, "interpolated": 1}
    assert table.told() == "of 6 sizes of layers looked up in the latency table: 2 measured, 3 rounded up, 1 interpolated"


# ---------------------------------------------------------------------- is it a table for here?


def test_a_table_measured_here_is_not_doubtful() -> None:
    about = settings("net", 2, [3, 9, 9], 4, 15, "cpu", False)
    assert Table(about, {}).check((3, 9, 9)) == []
    assert Table({}, {}).check((3, 9, 9)) == []  # one made by hand, that tells nothing


@pytest.mark.parametrize(
    ("was", "said"),
    [
        ({"machine": "Windows ARM64"}, "the latency table of net was measured on Windows ARM64, and here it is "),
        ({"device": "cpu Abacus"}, "the latency table of net was measured on cpu Abacus, and here it is cpu "),
        ({"device": "cuda:0 Tesla V100"}, "the latency table of net was measured on cuda:0 Tesla V100, and here it is cuda:0 "),
        ({"threads": 99}, f"the latency table of net was measured with 99 threads, and here it is {torch.get_num_threads()}."),
        ({"torch": "1.0"}, f"the latency table of net was measured with torch 1.0, and here it is {torch.__version__}."),
    ],
)
def test_a_table_measured_elsewhere_is_doubtful(was: dict[str, Any], said: str) -> None:
    about = settings("net", 2, [3, 9, 9], 4, 15, "cpu", False) | was
    [warning] = Table(about, {}).check([3, 9, 9])
    assert warning.startswith(said)
    assert warning.endswith("Times may differ: measure where the model is to be fast.")


def test_a_fit_that_is_far_off_is_told() -> None:
    [doubt] = Table({"model": "net", "off": 0.28}, {}).check((3,))
    assert doubt.startswith("the latency table of net is off by up to 28 % at the models that it was fitted to. Measure anew on a quiet")
    assert Table({"model": "net", "off": 0.09}, {}).check((3,)) == []


def test_threads_do_not_matter_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Chip {device}")
    about = settings("net", 2, [3], 4, 15, "cuda:1", False) | {"threads": 99}
    assert about["device"] == "cuda:1 Chip cuda:1"
    assert Table(about, {}).check([3]) == []


def test_the_processor_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "info").write_text("vendor_id : A\nmodel name\t: Abacus 3000: fast\nmodel name\t: Other\n")
    monkeypatch.setattr(table, "Path", lambda _: tmp_path / "info")
    assert table.here("cpu")["device"] == "cpu Abacus 3000: fast"
    monkeypatch.setattr(table, "Path", lambda _: tmp_path / "none")
    monkeypatch.setattr(table.platform, "processor", lambda: "arm")
    assert table.here("cpu")["device"] == "cpu arm"


def test_a_table_of_other_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of net is of inputs of size \[3, 9, 9\], and here they are \[3, 8, 8\]\. Measure anew: python"):
        Table({"model": "net", "input": [3, 9, 9]}, {}).check((3, 8, 8))


def test_an_unfinished_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"measuring the latency table of net was interrupted\. Run the same command again"):
        Table({"model": "net", "input": [3], "finished": False}, {}).check((3,))


# ---------------------------------------------------------------------- measuring


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 12, 3, stride=2, groups=4), nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.e = nn.Linear(6, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.e(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


def by_weights(monkeypatch: pytest.MonkeyPatch, whole: Callable[[float], float] = lambda ms: ms) -> list[list[int]]:
    """A layer takes as many milliseconds as it has weights, biases aside, and a :class:`Net` what ``whole`` makes of that; gives the list
    of what was measured together."""
    seen: list[list[int]] = []

    def count(calls: Any, repeats: int, device: torch.device) -> list[float]:
        seen.append([])
        times = []
        for call in calls:
            call()  # it must run
            module = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, nn.Module))
            seen[-1].append(sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)))
            times.append(whole(seen[-1][-1]) if isinstance(module, Net) else float(seen[-1][-1]))
        return times

    monkeypatch.setattr(command, "milliseconds", count)
    return seen


def test_every_layer_is_measured_over_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    net = Net()
    table = measure(net, "net", 2, [3, 9, 9], points=2)
    found = layers(net, torch.zeros(2, 3, 9, 9))
    weights = {n: m.weight.numel() for n, m in net.named_modules() if hasattr(m, "weight")}
    assert {n: table(layer, layer.inputs, layer.outputs) for n, layer in found.items()} == weights
    assert table(found["a"], 3, 7) == 3 * 8 * 9  # rounded up, as 8 were measured
    assert table(found["a"], 3, 3) == 3 * 3 * 9  # and 4 too, in between
    assert table(found["c"], 8, 8) == 8 * 8 * 9 / 4
    assert table(found["e"], 4, 10) == 4 * 10
    assert table.about["model_ms"] == sum(weights.values())
    assert (table.about["batch"], table.about["input"], table.about["threads"]) == (2, [3, 9, 9], torch.get_num_threads())


def test_measuring_leaves_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    net = Net().double()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    state = torch.get_rng_state()
    measure(net, "net", 1, [3, 9, 9], points=1, channels_last=True)
    assert net.training
    assert net.a.weight.is_contiguous()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_convolution_is_measured_with_the_batch_norm_behind_it_where_the_model_has_any() -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect")
    assert [type(m) for m in probe(conv, 2, 6, True)] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    alone = probe(conv, 2, 6, False)
    assert repr(alone) == repr(nn.Conv2d(2, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"))
    assert repr(probe(nn.Conv1d(4, 4, 3, groups=4, bias=False), 3, 3, False)) == repr(nn.Conv1d(3, 3, 3, groups=3, bias=False))
    up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)
    assert repr(probe(up, 2, 3, False)) == repr(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1))
    assert repr(probe(nn.Linear(4, 4), 2, 3, True)) == repr(nn.Linear(2, 3))


def test_the_sizes_that_are_measured() -> None:
    assert axis(64, 4, 1) == [1, 16, 32, 48, 64]
    assert axis(3, 4, 1) == [1, 2, 3]
    assert axis(12, 4, 4) == [4, 8, 12]
    assert axis(10, 1, 1) == [1, 10]


def test_the_clock_gives_the_median_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 10.0 if calls[0] % 200 == 0 else 1e-5  # now and then something else runs

    monkeypatch.setattr(probes.time, "perf_counter", lambda: now[0])
    assert milliseconds([call], 15, torch.device("cpu")) == [pytest.approx(0.01)]
    assert calls[0] >= 15 * 50  # readings of half a millisecond


def test_readings_of_several_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], ""

    def call(name: str, seconds: float) -> None:
        nonlocal order
        order += name
        now[0] += seconds * (1 if len(order) <= 14 else 2)  # halfway the machine becomes slower

    monkeypatch.setattr(probes.time, "perf_counter", lambda: now[0])
    pair = [lambda: call("a", 0.001), lambda: call("b", 0.003)]
    a, b = milliseconds(pair, 11, torch.device("cpu"))
    assert order == "ab" * 12
    assert b / a == pytest.approx(3)


def test_models_are_timed_without_autograd() -> None:
    found = []
    milliseconds([lambda: found.append(torch.is_inference_mode_enabled())], 1, torch.device("cpu"))
    assert all(found)


def test_a_longer_layer_takes_longer() -> None:
    times = milliseconds([lambda n=n: torch.ones(n, n) @ torch.ones(n, n) for n in (16, 512)], 5, torch.device("cpu"))
    assert 0 < 5 * times[0] < times[1]


# ---------------------------------------------------------------------- the whole model


def test_the_line_has_the_smallest_relative_errors() -> None:
    exact = fitted([14.0, 8.0, 5.0], [10.0, 5.0, 2.5])
    assert (exact.constant, exact.factor, exact.off, exact.why) == (pytest.approx(2), pytest.approx(1.2), pytest.approx(0), "")
    times, sums = [14.0, 8.0, 4.5], [10.0, 5.0, 2.5]
    fit = fitted(times, sums)

    def errors(constant: float, factor: float) -> float:
        return sum(((constant + factor * s) / t - 1) ** 2 for t, s in zip(times, sums, strict=True))

    best = errors(fit.constant, fit.factor)
    assert all(errors(fit.constant + a, fit.factor + b) > best for a in (-0.01, 0, 0.01) for b in (-0.01, 0, 0.01) if (a, b) != (0, 0))
    found = [fit.at(s) for s in sums]
    assert fit.off == max(abs(f / t - 1) for f, t in zip(found, times, strict=True)) < 0.05
    assert fit.about == {"model_ms": 14, "half_ms": 8, "quarter_ms": 4.5, "model_ms_by_table": found[0], "off": fit.off}
    parts = [f"{n} {t:g} ms (by the table {f:.4g})" for n, t, f in zip(("all channels", "half", "a quarter"), times, found, strict=True)]
    assert str(fit) == f"the model as {fit.constant:.4g} ms + {fit.factor:.4g} x its layers: {', '.join(parts)}"


def test_the_line_through_times_that_lie_on_one_is_that_line() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(500):
        sums = sorted((torch.randperm(3000, generator=draw)[:3] + 1.0).tolist(), reverse=True)
        for constant, factor in ((0.0, 1.0), (0.0, 0.75), (2.0, 1.5)):
            fit = fitted([constant + factor * s for s in sums], sums)
            assert (fit.constant, fit.factor) == (constant, factor)  # sums and times are floats without rounding, and so is the line


@pytest.mark.parametrize(
    ("times", "sums", "line"),
    [
        ([40.0, 12.0, 3.0], [40.0, 20.0, 10.0], (0.0, None)),  # the best of all lines would start below 0
        ([10.0, 30.0, 9.0], [9.0, 3.0, 2.0], (None, 0.0)),  # the best of all would fall
    ],
)
def test_neither_part_of_the_line_is_below_zero(times: list[float], sums: list[float], line: tuple[float | None, float | None]) -> None:
    fit = fitted(times, sums)
    assert min(fit.constant, fit.factor) >= 0 < max(fit.constant, fit.factor)
    assert all(expected in (None, got) for expected, got in zip(line, (fit.constant, fit.factor), strict=True))
    assert fit.why == ""


@pytest.mark.parametrize(
    ("times", "sums", "line"),
    [
        ([14.0, 8.0, 15.0], [10.0, 5.0, 2.5], (4.0, 1.0)),  # a quarter of the channels takes longer
        ([14.0, 8.0, 14.0], [10.0, 5.0, 2.5], (4.0, 1.0)),
        ([14.0, 8.0, 4.5], [10.0, 5.0, 11.0], (4.0, 1.0)),
        ([8.0, 9.0, 9.5], [10.0, 5.0, 2.5], (0.0, 0.8)),  # no constant is below zero
    ],
)
def test_what_gives_no_line_is_said(times: list[float], sums: list[float], line: tuple[float, float]) -> None:
    fit = fitted(times, sums)
    assert (fit.constant, fit.factor) == line
    assert fit.at(sums[0]) == times[0]
    words = f"; not fitted: a quarter of the channels takes {times[-1]:g} of {times[0]:g} ms, its layers {sums[-1]:g} of {sums[0]:g} ms"
    assert str(fit).endswith(words)


def test_the_units_that_a_share_keeps() -> None:
    assert [kept(n, 0.5) for n in (64, 24, 16, 8, 10, 3, 2)] == [32, 16, 8, 4, 5, 2, 1]
    assert [kept(n, 0.25) for n in (64, 24, 16, 8, 10, 3, 2)] == [16, 8, 4, 2, 2, 1, 1]


def test_a_smaller_model_has_fewer_channels_in_every_group() -> None:
    net, x = Net().eval(), torch.zeros(1, 3, 9, 9)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    groups = [g for g in slimmable_groups(net, x) if not g.reason]
    small = layers(shrunk(net, groups, 0.5), x)
    assert {n: (k.inputs, k.outputs) for n, k in small.items()} == {"a": (3, 4), "b": (4, 4), "c": (4, 8), "d": (8, 3), "e": (3, 10)}
    others, why = smaller(net, x)
    assert why == ""
    assert [m.e.in_features for m in others] == [3, 2]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_whole_model_is_measured_with_fewer_channels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, told = by_weights(monkeypatch, lambda ms: 2 + 1.5 * ms), []
    net = Net()
    table = measure(net, "net", 1, [3, 9, 9], points=2, tell=told.append)
    assert (table.constant, table.factor) == (pytest.approx(2), pytest.approx(1.5))
    assert [len(together) for together in seen[-2:]] == [1, 3]  # the models take turns
    dense, half, quarter = (2 + 1.5 * n for n in seen[-1])
    assert dense > half > quarter
    assert told[-1] == (
        f"the model as 2 ms + 1.5 x its layers: all channels {dense:.4g} ms (by the table {dense:.4g}), half {half:.4g} ms (by the table "
        f"{half:.4g}), a quarter {quarter:.4g} ms (by the table {quarter:.4g})"
    )
    expected = {"model_ms": dense, "half_ms": half, "quarter_ms": quarter, "model_ms_by_table": pytest.approx(dense)}
    assert {k: v for k, v in table.about.items() if k in expected} == expected
    assert table.about["off"] < 1e-6
    x = torch.zeros(1, 3, 9, 9)
    groups = [g for g in slimmable_groups(net, x) if not g.reason]
    network = Network(layers(net, x), groups, table, table.constant)
    assert network.dense == pytest.approx(dense)
    assert network.realised([kept(g.size, 0.5) for g in groups]) == pytest.approx(half)


def test_without_channels_to_remove_the_rest_is_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch, lambda ms: 2 + 1.5 * ms)
    weights = sum(m.weight.numel() for m in Net().modules() if hasattr(m, "weight"))
    missing = ImportError("torch-pruning is needed here")

    def absent(*_: Any) -> Any:
        raise missing

    why = {
        absent: "its channels cannot be removed (ImportError: torch-pruning is needed here)",
        lambda *_: []: "no channels of this model can be removed",
    }
    for search, words in why.items():
        monkeypatch.setattr(fit, "slimmable_groups", search)
        told: list[str] = []
        table = measure(Net(), "net", 1, [3, 9, 9], points=2, tell=told.append)
        assert (table.constant, table.factor) == (2 + 0.5 * weights, 1)
        whole = f"{2 + 1.5 * weights:.4g}"
        assert told[-1].endswith(f"+ 1 x its layers: all channels {whole} ms (by the table {whole}); not fitted: {words}")
        assert "half_ms" not in table.about


def test_a_model_that_takes_no_fewer_channels_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.e.in_features < 6:
                raise RuntimeError("six or none")
            return super().forward(x)

    by_weights(monkeypatch)
    monkeypatch.setattr(fit, "slimmable_groups", lambda m, x: slimmable_groups(Net().eval(), x))
    told: list[str] = []
    assert measure(Fixed(), "net", 1, [3, 9, 9], points=1, tell=told.append).factor == 1
    assert told[-1].endswith("not fitted: its channels cannot be removed (RuntimeError: six or none)")


# ---------------------------------------------------------------------- files and the command line


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
    with pytest.raises(ValueError, match=r"is no latency table of version 2 \(FileNotFoundError.*Measure one: python -m sparse"):
        Table.load(path)
    for content in ("nothing", "[]", "{}", OLD, UNKNOWN):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is no latency table of version 2 \("):
            Table.load(path)


def test_a_layer_that_the_table_does_not_cover_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    net = Net()
    table = measure(net, "net", 1, [3, 9, 9], points=2)
    other = layers(net, torch.zeros(1, 3, 11, 11))["c"]
    with pytest.raises(ValueError, match=r"of net \(input \[3, 9, 9\]\) does not cover c with 8 inputs and 12 outputs: no 'conv .*11x11'"):
        table(other, 8, 12)
    with pytest.raises(ValueError, match=r"does not cover c with 40 inputs and 12 outputs: 40 inputs lie outside"):
        table(layers(net, torch.zeros(1, 3, 9, 9))["c"], 40, 12)


LINEAR = ["torch.nn:Linear", "--arguments", '{"in_features": 6, "out_features": 4}', "--input", "6", "--points", "1"]


def test_the_command_measures_keeps_and_reuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = by_weights(monkeypatch)
    out = tmp_path / "new" / "t.json"
    words = [*LINEAR, "--out", str(out)]
    main(words)
    shown = capsys.readouterr().out
    assert "all channels 24 ms (by the table 24); not fitted: no channels of this model can be removed" in shown
    assert f"1 kinds of layers in {out}" in shown
    table = Table.load(out)
    assert table.grids == {"linear map 1": Grid([1, 6], [1, 4], [[1.0, 4.0], [6.0, 24.0]])}
    assert table.about["model"] == 'torch.nn:Linear {"in_features": 6, "out_features": 4}'
    assert table.about["finished"]
    measured = len(seen)
    main(words)
    assert len(seen) == measured + 1  # the whole model; its layers were known
    main([*words, "--overwrite"])
    assert len(seen) == 2 * measured + 1
    main([*words, "--batch", "2", "--overwrite"])
    assert Table.load(out).about["batch"] == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch", "2"], "batch 1 (now 2)."),
        (["--points", "8"], "points 1 (now 8)."),
        (["--repeats", "3", "--channels-last"], "repeats 15 (now 3), channels_last False (now True)."),
        (["--arguments", '{"in_features": 6}'], 'model torch.nn:Linear {"in_features": 6, "out_features": 4} (now torch.nn:Linear {"in_f'),
    ],
)
def test_a_file_of_other_settings_stays(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_weights(monkeypatch)
    out = tmp_path / "t.json"
    main([*LINEAR, "--out", str(out)])
    before = out.read_text()
    with pytest.raises(SystemExit, match="2"):
        main([*LINEAR, "--out", str(out), *more])
    shown = " ".join(capsys.readouterr().err.split())
    assert f"--out {out} holds a table of other settings: " in shown
    assert said in shown
    assert shown.endswith("Give another --out, or --overwrite to measure everything anew.")
    assert out.read_text() == before


def test_a_kind_with_other_sizes_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    known = {"linear map 1": Grid([1, 4], [1, 4], [[0.0, 0.0], [0.0, 0.0]]), "gone": Grid([1], [1], [[0.0]])}
    grids = measure(nn.Linear(6, 4), "net", 1, [6], points=1, known=known).grids
    assert grids == {"linear map 1": Grid([1, 6], [1, 4], [[1.0, 4.0], [6.0, 24.0]])}


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = by_weights(monkeypatch)
    count = command.milliseconds
    out = tmp_path / "t.json"
    monkeypatch.setitem(sys.modules, "mine", type("mine", (), {"net": Net}))
    words = ["mine:net", "--input", "3", "9", "9", "--points", "1", "--out", str(out)]

    def impatient(*given: Any) -> list[float]:
        if len(seen) == 7:  # 4 of the first kind, 2 of the second, 1 of the third
            raise KeyboardInterrupt
        return count(*given)

    monkeypatch.setattr(command, "milliseconds", impatient)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    part = Table.load(out)
    assert len(part.grids) == 2
    with pytest.raises(ValueError, match="was interrupted"):
        part.check([3, 9, 9])
    monkeypatch.setattr(command, "milliseconds", count)
    before = len(seen)
    main(words)
    table = Table.load(out)
    assert len(seen) - before == 3 * 4 + 1  # three kinds, and the whole
    assert len(table.grids) == 5
    assert all("is off by up to" in doubt for doubt in table.check([3, 9, 9]))  # the times are made up


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "argument --batch: '0' is no whole number from 1 on"),
        (["--repeats", "0"], "argument --repeats: '0' is no whole number from 1 on"),
        (["--points", "-1"], "argument --points: '-1' is no whole number from 1 on"),
        (["--threads", "x"], "argument --threads: 'x' is no whole number from 1 on"),
        (["--input", "3", "0"], "argument --input: '0' is no whole number from 1 on"),
        (["--arguments", "{width: 2}"], "argument --arguments: '{width: 2}' is no JSON (Expecting"),
        (["--arguments", "[2]"], "argument --arguments: '[2]' has no names; write named arguments"),
        (["--arguments", "{}"], "model 'torch.nn:Linear' does not take {}: "),
        (["--device", "abacus"], "--device abacus cannot be used (Expected one of cpu"),
        (["--input", "7"], "the model fails with a float tensor of size [1, 7] (RuntimeError: "),
    ],
)
def test_arguments_that_cannot_be_are_refused(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*LINEAR, "--out", str(tmp_path / "t.json"), *words])
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("mynets", "model 'mynets' is not of the form module:callable, such as torchvision.models:resnet18."),
        (":net", "model ':net' is not of the form module:callable"),
        ("nonets:small", "model 'nonets:small': No module named 'nonets'. Install nonets, or run the command in the folder that it is in."),
        ("torch.nn:Lineal", "has no attribute 'Lineal'. Give a function or class of torch.nn that makes the model."),
        ("torch:zeros", "model 'torch:zeros' gives a Tensor, no torch.nn.Module."),
    ],
)
def test_what_gives_no_model_is_refused(model: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arguments", '{"size": [2]}'] if model == "torch:zeros" else []
    with pytest.raises(SystemExit, match="2"):
        main([model, "--input", "6", "--out", str(tmp_path / "t.json"), *words])
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_the_command_is_made_of_says_why_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model 'net' is not of the form module:callable"):
        command.built("net", {})
    with pytest.raises(ValueError, match=r"fails with a float tensor of size \[1, 3\] \(RuntimeError: no such thing\)\. Give --input"):
        command.fits(Odd(), [3])
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(ValueError, match=r"--out holds something else: .* is no latency table of version 2 .* or --overwrite"):
        command.reusable(tmp_path / "t.json", {})


def test_the_place_of_the_file_is_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path / "file" / "t.json", "its folder cannot be made ("), (tmp_path, "is a folder, or in one that cannot be")):
        with pytest.raises(SystemExit, match="2"):
            main(["nonets:small", "--input", "6", "--out", str(out)])
        assert f"--out {out}{':' if 'made' in said else ''} {said}" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(command.os, "access", lambda *_: False)  # what a folder of somebody else's gives
    assert "cannot be written to" in command._misplaced(tmp_path / "t.json")


def test_the_help_says_which_inputs_there_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "one tensor of floating-point numbers" in " ".join(capsys.readouterr().out.split())


def test_a_table_measured_here_serves_as_a_cost() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3))
    table = measure(net, "net", 1, [3, 24, 24], points=2, repeats=3)
    last = layers(net, torch.zeros(1, 3, 24, 24))["3"]
    assert table(last, 1, 1) < table(last, 32, 32)
    assert flops(last, 32, 32) == 32 * 32 * 9 * 400
