"""Latency tables: lookup, interpolation, refusals, JSON, measuring, the command line. Times are set by a rule, not by a clock."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles_smcp import FALLBACK
from torch import nn

from sparse_callbacks import latency
from sparse_callbacks.costs import Layer, flops, layers
from sparse_callbacks.latency import axis, main, measure, milliseconds, probe
from sparse_callbacks.latency_table import Grid, Table, fallback, signature

# ---------------------------------------------------------------------- lookup


@pytest.mark.parametrize("channels", FALLBACK)
def test_numbers_are_rounded_up_in_the_published_order(channels: tuple[int, int]) -> None:
    assert fallback(*channels) == FALLBACK[channels]


@pytest.mark.parametrize("channels", FALLBACK)
def test_the_first_of_them_that_was_measured_is_taken(channels: tuple[int, int]) -> None:
    for first in range(len(FALLBACK[channels])):
        measured = FALLBACK[channels][first:]
        ins, outs = (sorted({m[d] for m in measured[:1]}) for d in (0, 1))
        assert Grid(ins, outs, [[float(first)]])(*channels) == first


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


def test_layers_that_take_different_times_have_different_signatures() -> None:
    base = {"kernel": (3, 3), "settings": "stride 1x1"}
    kinds = [
        Layer("a", 8, 8, **base), Layer("a", 8, 8, (5, 5), settings="stride 1x1"), Layer("a", 8, 8, (3, 3), settings="stride 2x2"),
        Layer("a", 8, 8, groups=2, **base), Layer("a", 8, 8, groups=8, **base), Layer("a", 8, 16, groups=8, **base), Layer("a", 8, 8),
    ]  # fmt: skip
    found = {signature(k, inner) for k in kinds for inner in ((1, 8, 8), (1, 4, 4), (2, 8, 8))}
    assert len(found) == 3 * len(kinds)
    assert signature(Layer("a", 8, 8, **base), (1, 8, 8)) == signature(Layer("b", 16, 4, **base), (1, 8, 8))


# ---------------------------------------------------------------------- measuring


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 12, 3, stride=2, groups=4), nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.e = nn.Linear(6, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.e(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


def by_weights(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A layer takes as many milliseconds as it has weights, biases aside; gives the list of what was measured."""
    seen: list[int] = []

    def count(call: Any, repeats: int, device: torch.device) -> float:
        call()  # it must run
        module = next(c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, nn.Module))
        seen.append(sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)))
        return float(seen[-1])

    monkeypatch.setattr(latency, "milliseconds", count)
    return seen


def test_every_layer_is_measured_over_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    net = Net()
    table = measure(net, "net", 2, [3, 9, 9], points=2)
    found = layers(net, torch.zeros(2, 3, 9, 9))
    weights = {n: m.weight.numel() for n, m in net.named_modules() if hasattr(m, "weight")}
    assert {n: table(layer, layer.inputs, layer.outputs) for n, layer in found.items()} == weights
    assert table(found["a"], 3, 3) == 3 * 8 * 9  # rounded up, as 8 were measured
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

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    assert milliseconds(call, 15, torch.device("cpu")) == pytest.approx(0.01)
    assert calls[0] >= 15 * 50  # readings of half a millisecond


def test_a_longer_layer_takes_longer() -> None:
    times = [milliseconds(lambda n=n: torch.ones(n, n) @ torch.ones(n, n), 5, torch.device("cpu")) for n in (16, 512)]
    assert 0 < 5 * times[0] < times[1]


# ---------------------------------------------------------------------- files and the command line


def test_a_table_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    table = measure(Net(), "net", 1, [3, 9, 9], points=2)
    table.save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json") == table


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(ValueError, match=r"is no latency table of version 1 \(FileNotFoundError.*Measure one: python -m sparse"):
        Table.load(path)
    for content in ("nothing", "[]", "{}", json.dumps({"version": 2}), json.dumps({"version": 1, "about": {}, "grids": {"a": {"b": 1}}})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is no latency table of version 1 \("):
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


def test_the_command_measures_keeps_and_reuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = by_weights(monkeypatch)
    out = tmp_path / "t.json"
    words = ["torch.nn:Linear", "--arguments", '{"in_features": 6, "out_features": 4}', "--input", "6", "--points", "1", "--out", str(out)]
    main(words)
    assert "1 kinds of layers" in capsys.readouterr().out
    table = Table.load(out)
    assert table.grids == {"linear map 1": Grid([1, 6], [1, 4], [[1.0, 4.0], [6.0, 24.0]])}
    assert table.about["model"] == "torch.nn:Linear"
    measured = len(seen)
    main(words)
    assert len(seen) == measured + 1  # the whole model; its layers were known
    main([*words, "--batch", "2"])  # another setting
    assert len(seen) == 2 * measured + 1


def test_a_table_measured_here_serves_as_a_cost() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3))
    table = measure(net, "net", 1, [3, 24, 24], points=2, repeats=3)
    last = layers(net, torch.zeros(1, 3, 24, 24))["3"]
    assert table(last, 1, 1) < table(last, 32, 32)
    assert flops(last, 32, 32) == 32 * 32 * 9 * 400
