"""Measuring a latency table: every kind of layer alone, and the line that is fitted to the whole model in three
sizes."""

from typing import Any

import pytest
import torch
from support.latency_rig import Net, by_weights
from torch import nn

from sparse_callbacks.channels.costs import layers, multiply_adds
from sparse_callbacks.channels.latency import fit
from sparse_callbacks.channels.latency.fit import fitted, shrunk, smaller, units_of_share
from sparse_callbacks.channels.latency.measure import measure
from sparse_callbacks.channels.latency.probes import axis, probe
from sparse_callbacks.channels.latency.table import Grid
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.channels.slim import slimmable_groups

# ---------------------------------------------------------------------- measuring


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
    assert (table.about["batch"], table.about["input"], table.about["threads"]) == (
        2,
        [3, 9, 9],
        torch.get_num_threads(),
    )


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
    assert repr(probe(nn.Conv1d(4, 4, 3, groups=4, bias=False), 3, 3, False)) == repr(
        nn.Conv1d(3, 3, 3, groups=3, bias=False)
    )
    up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)
    assert repr(probe(up, 2, 3, False)) == repr(nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1))
    assert repr(probe(nn.Linear(4, 4), 2, 3, True)) == repr(nn.Linear(2, 3))


def test_the_sizes_that_are_measured() -> None:
    assert axis(64, 4, 1) == [1, 16, 32, 48, 64]
    assert axis(3, 4, 1) == [1, 2, 3]
    assert axis(12, 4, 4) == [4, 8, 12]
    assert axis(10, 1, 1) == [1, 10]


def test_a_kind_with_other_sizes_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch)
    known = {"linear map 1": Grid([1, 4], [1, 4], [[0.0, 0.0], [0.0, 0.0]]), "gone": Grid([1], [1], [[0.0]])}
    grids = measure(nn.Linear(6, 4), "net", 1, [6], points=1, known=known).grids
    assert grids == {"linear map 1": Grid([1, 6], [1, 4], [[1.0, 4.0], [6.0, 24.0]])}


def test_models_are_timed_without_autograd() -> None:
    found = []

    class Noting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found.append(torch.is_inference_mode_enabled())
            return super().forward(x)

    measure(Noting(2, 2), "net", 1, [2], points=1, repeats=1)
    assert found[-1]  # the whole model is timed last


def test_a_table_measured_here_serves_as_a_cost() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3))
    table = measure(net, "net", 1, [3, 24, 24], points=2, repeats=3)
    last = layers(net, torch.zeros(1, 3, 24, 24))["3"]
    assert table(last, 1, 1) < table(last, 32, 32)
    assert multiply_adds(last, 32, 32) == 32 * 32 * 9 * 400


# ---------------------------------------------------------------------- the whole model


def test_the_line_has_the_smallest_relative_errors() -> None:
    exact = fitted([14.0, 8.0, 5.0], [10.0, 5.0, 2.5])
    assert (exact.constant, exact.factor, exact.largest_error, exact.reason) == (
        pytest.approx(2),
        pytest.approx(1.2),
        pytest.approx(0),
        "",
    )
    times, sums = [14.0, 8.0, 4.5], [10.0, 5.0, 2.5]
    fit = fitted(times, sums)

    def errors(constant: float, factor: float) -> float:
        return sum(((constant + factor * s) / t - 1) ** 2 for t, s in zip(times, sums, strict=True))

    best = errors(fit.constant, fit.factor)
    assert all(
        errors(fit.constant + a, fit.factor + b) > best
        for a in (-0.01, 0, 0.01)
        for b in (-0.01, 0, 0.01)
        if (a, b) != (0, 0)
    )
    found = [fit.at(s) for s in sums]
    assert fit.largest_error == max(abs(f / t - 1) for f, t in zip(found, times, strict=True)) < 0.05
    assert fit.about == {
        "model_ms": 14,
        "half_ms": 8,
        "quarter_ms": 4.5,
        "model_ms_by_table": found[0],
        "off": fit.largest_error,
    }
    parts = [
        f"{n} {t:g} ms (by the table {f:.4g})"
        for n, t, f in zip(("all channels", "half", "a quarter"), times, found, strict=True)
    ]
    assert str(fit) == f"the model as {fit.constant:.4g} ms + {fit.factor:.4g} x its layers: {', '.join(parts)}"


def test_the_line_through_times_that_lie_on_one_is_that_line() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(500):
        sums = sorted((torch.randperm(3000, generator=draw)[:3] + 1.0).tolist(), reverse=True)
        for constant, factor in ((0.0, 1.0), (0.0, 0.75), (2.0, 1.5)):
            fit = fitted([constant + factor * s for s in sums], sums)
            assert (fit.constant, fit.factor) == (
                constant,
                factor,
            )  # sums and times are floats without rounding, and so is the line


@pytest.mark.parametrize(
    ("times", "sums", "line"),
    [
        ([40.0, 12.0, 3.0], [40.0, 20.0, 10.0], (0.0, None)),  # the best of all lines would start below 0
        ([10.0, 30.0, 9.0], [9.0, 3.0, 2.0], (None, 0.0)),  # the best of all would fall
    ],
)
def test_neither_part_of_the_line_is_below_zero(
    times: list[float], sums: list[float], line: tuple[float | None, float | None]
) -> None:
    fit = fitted(times, sums)
    assert min(fit.constant, fit.factor) >= 0 < max(fit.constant, fit.factor)
    assert all(expected in (None, got) for expected, got in zip(line, (fit.constant, fit.factor), strict=True))
    assert fit.reason == ""


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
    assert [units_of_share(n, 0.5) for n in (64, 24, 16, 8, 10, 3, 2)] == [32, 16, 8, 4, 5, 2, 1]
    assert [units_of_share(n, 0.25) for n in (64, 24, 16, 8, 10, 3, 2)] == [16, 8, 4, 2, 2, 1, 1]


def test_a_smaller_model_has_fewer_channels_in_every_group() -> None:
    net, x = Net().eval(), torch.zeros(1, 3, 9, 9)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    groups = [g for g in slimmable_groups(net, x) if not g.reason]
    small = layers(shrunk(net, groups, 0.5), x)
    assert {n: (k.inputs, k.outputs) for n, k in small.items()} == {
        "a": (3, 4),
        "b": (4, 4),
        "c": (4, 8),
        "d": (8, 3),
        "e": (3, 10),
    }
    others, why = smaller(net, x)
    assert why == ""
    assert [m.e.in_features for m in others] == [3, 2]
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_whole_model_is_measured_with_fewer_channels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, told = by_weights(monkeypatch, lambda ms: 2 + 1.5 * ms), []
    net = Net()
    table = measure(net, "net", 1, [3, 9, 9], points=2, report=told.append)
    assert (table.constant, table.factor) == (pytest.approx(2), pytest.approx(1.5))
    assert [len(together) for together in seen[-2:]] == [1, 3]  # the models take turns
    dense, half, quarter = (2 + 1.5 * n for n in seen[-1])
    assert dense > half > quarter
    assert told[-1] == (
        f"the model as 2 ms + 1.5 x its layers: all channels {dense:.4g} ms (by the table {dense:.4g}), "
        f"half {half:.4g} ms (by the table {half:.4g}), a quarter {quarter:.4g} ms (by the table {quarter:.4g})"
    )
    expected = {"model_ms": dense, "half_ms": half, "quarter_ms": quarter, "model_ms_by_table": pytest.approx(dense)}
    assert {k: v for k, v in table.about.items() if k in expected} == expected
    assert table.about["off"] < 1e-6
    x = torch.zeros(1, 3, 9, 9)
    groups = [g for g in slimmable_groups(net, x) if not g.reason]
    network = Network(layers(net, x), groups, table, table.constant)
    assert network.dense == pytest.approx(dense)
    assert network.realised([units_of_share(g.size, 0.5) for g in groups]) == pytest.approx(half)


def test_without_channels_to_remove_the_rest_is_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    by_weights(monkeypatch, lambda ms: 2 + 1.5 * ms)
    weights = sum(m.weight.numel() for m in Net().modules() if hasattr(m, "weight"))
    missing = ImportError("something is needed here")

    def absent(*_: Any) -> Any:
        raise missing

    why = {
        absent: "its channels cannot be removed (ImportError: something is needed here)",
        lambda *_: []: "no channels of this model can be removed",
    }
    for search, words in why.items():
        monkeypatch.setattr(fit, "slimmable_groups", search)
        told: list[str] = []
        table = measure(Net(), "net", 1, [3, 9, 9], points=2, report=told.append)
        assert (table.constant, table.factor) == (2 + 0.5 * weights, 1)
        whole = f"{2 + 1.5 * weights:.4g}"
        assert told[-1].endswith(
            f"+ 1 x its layers: all channels {whole} ms (by the table {whole}); not fitted: {words}"
        )
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
    assert measure(Fixed(), "net", 1, [3, 9, 9], points=1, report=told.append).factor == 1
    assert told[-1].endswith("not fitted: its channels cannot be removed (RuntimeError: six or none)")
