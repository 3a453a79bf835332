"""Rules that share a target out over layers by shapes and by weights, against tables and by their properties."""

import math
from typing import Any

import pytest
import torch
from oracles.allocations import ERK, KEPT, LAMP_SMALL, SCORES, SHAPES, WEIGHTS
from support.simulated import Meeting, on_each, parts
from torch import Tensor

from sparse_callbacks.core.allocations.by_weight import lamp_scores, largest_by, shares_by
from sparse_callbacks.core.distributions import (
    erdos_renyi_kernel,
    global_magnitude,
    lamp,
    resolve,
    uniform,
    uniform_plus,
)
from sparse_callbacks.core.ops import keep_largest_jointly, zeros_for

NETWORK = {name: torch.tensor(values, dtype=torch.float64).view(SHAPES[name]) for name, values in WEIGHTS.items()}


def kept(shares: dict[str, float]) -> list[int]:
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    return [sizes[name] - zeros_for(share, sizes[name]) for name, share in shares.items()]


def drawn(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(n, generator=generator) * (i + 1) for i, n in enumerate(sizes)}


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("sparsity", KEPT)
def test_allocations_of_a_small_network(sparsity: float) -> None:
    expected = KEPT[sparsity]
    assert kept(global_magnitude(NETWORK, sparsity, least=0)) == expected["global"]
    assert kept(lamp(NETWORK, sparsity)) == expected["lamp"]
    assert kept(uniform(SHAPES, sparsity)) == expected["uniform"]
    found = uniform_plus(SHAPES, sparsity)
    assert kept(found) == expected["uniform_plus"]
    assert 1 - found["conv2"] == pytest.approx(expected["density_of_the_middle"], abs=1e-10)  # 10 digits are given
    assert found["conv1"] == 0.0
    assert (found["fc"] == 0.8) == expected["last_at_its_floor"]
    assert sum(expected["global"]) == sum(expected["lamp"]) == 202 - zeros_for(sparsity, 202)


def test_scores_of_lamp() -> None:
    for name, scores in SCORES.items():
        expected = torch.tensor(scores, dtype=torch.float64).view(SHAPES[name])
        assert torch.allclose(lamp_scores(NETWORK[name]), expected, rtol=2e-8, atol=1e-10)  # 10 digits are given
    layers = {str(i): torch.tensor(values) for i, values in enumerate(LAMP_SMALL["layers"])}
    for layer, scores in zip(layers.values(), LAMP_SMALL["scores"], strict=True):
        # the layers are given in float32, so 0.1 is not a tenth
        assert lamp_scores(layer).tolist() == pytest.approx(scores, abs=1e-7)
    found = lamp(layers, 3 / 7)
    assert [layer.numel() - zeros_for(found[n], layer.numel()) for n, layer in layers.items()] == LAMP_SMALL["kept"]


def test_erk_densities() -> None:
    found = erdos_renyi_kernel({str(i): tuple(shape) for i, shape in enumerate(ERK["shapes"])}, 0.8)
    # the table shares a fifth of all weights, and the rule floors the zeros of each layer before it sums: one weight
    assert [1 - s for s in found.values()] == pytest.approx(ERK["densities"], abs=2e-5)


# ---------------------------------------------------------------------- uniform+


def test_uniform_plus_that_leaves_nothing_for_the_middle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves 7 weights, and uniform_plus keeps all of conv1 and a fifth of fc"):
        uniform_plus(SHAPES, 0.97)
    with pytest.raises(ValueError, match="uniform_plus keeps a fifth of fc: nothing remains"):
        uniform_plus({"fc": (10, 10)}, 0.9)
    with pytest.raises(ValueError, match="uniform_plus keeps all of conv: nothing remains"):
        uniform_plus({"conv": (4, 4, 3)}, 0.5)


def test_uniform_plus_without_a_convolution_has_no_dense_layer() -> None:
    shapes = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
    assert uniform_plus(shapes, 0.7) == pytest.approx(dict.fromkeys(shapes, 0.7), abs=1e-5)
    found = uniform_plus(shapes, 0.9)
    assert found["fc3"] == 0.8
    assert found["fc1"] == found["fc2"] == pytest.approx((0.9 * 266200 - 800) / 265200, abs=1e-5)


def test_uniform_plus_counts_the_first_convolution_wherever_it_stands() -> None:
    found = uniform_plus({"fc": (20, 30), "conv": (4, 3, 3), "head": (5, 20)}, 0.5)
    assert found["conv"] == 0.0
    assert found["fc"] == found["head"] == pytest.approx((368 - 0) / 700, abs=1e-12)
    assert uniform_plus({"fc": (20, 30), "conv": (4, 3, 3)}, 0.9)["conv"] == 0.0  # the last layer, and yet dense


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.9, 0.95])
def test_uniform_plus_meets_the_target_within_a_weight_of_each_layer(sparsity: float) -> None:
    shapes = {"conv": (4, 3, 3, 3), "a": (40, 31), "b": (57, 40), "c": (33, 57), "head": (10, 33)}
    for custom in ({}, {"b": 0.25}):
        found = uniform_plus(shapes, sparsity, custom=custom)
        left = {n: s for n, s in shapes.items() if n not in custom}
        zeros = sum(zeros_for(found[n], math.prod(s)) for n, s in left.items())
        wanted = zeros_for(sparsity, sum(map(math.prod, left.values())))
        assert wanted - len(left) < zeros <= wanted
        assert found | custom == found


# ---------------------------------------------------------------------- by weights


@pytest.mark.parametrize("sizes", [(50,), (1, 2, 3, 400), (1, 1, 1), (300, 300)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("share", [global_magnitude, lamp])
def test_zeros_are_exactly_the_floor_of_the_target(share: Any, sparsity: float, sizes: tuple[int, ...]) -> None:
    weights = drawn(*sizes)
    total = sum(sizes)
    if zeros_for(sparsity, total) > total - len(sizes):
        with pytest.raises(ValueError, match=r"cannot be reached: each of the . layers keeps at least one"):
            share(weights, sparsity)
        return
    found = share(weights, sparsity)
    zeros = {name: zeros_for(found[name], weight.numel()) for name, weight in weights.items()}
    assert sum(zeros.values()) == zeros_for(sparsity, total)
    assert all(zeros[n] < w.numel() for n, w in weights.items())
    backwards = share(dict(reversed(weights.items())), sparsity)
    assert backwards == found  # no two of these weights are equal


def test_one_threshold_is_that_of_all_weights_joined() -> None:
    weights = drawn(70, 20, 110)
    found = global_magnitude(weights, 0.6)
    threshold = torch.cat(list(weights.values())).abs().sort(descending=True).values[79]
    assert {n: int((w.abs() < threshold).sum()) for n, w in weights.items()} == {
        n: zeros_for(found[n], w.numel()) for n, w in weights.items()
    }


def test_lamp_is_one_threshold_over_scores_by_the_definition() -> None:
    weights = drawn(40, 25, 60, seed=1)
    scores = {}
    for name, weight in weights.items():
        squares = weight.double().square()
        scores[name] = [float(s / squares[squares >= s].sum()) for s in squares]
    bound = sorted((s for values in scores.values() for s in values), reverse=True)[24]
    expected = {n: sum(s < bound for s in values) for n, values in scores.items()}
    found = lamp(weights, 0.8)
    assert {n: zeros_for(found[n], w.numel()) for n, w in weights.items()} == expected


def test_lamp_does_not_see_the_scale_of_a_layer_and_one_threshold_does() -> None:
    weights = drawn(40, 40)
    scaled = {**weights, "layer0": weights["layer0"] * 1024}
    assert lamp(scaled, 0.7) == lamp(weights, 0.7)
    assert global_magnitude(scaled, 0.7)["layer1"] == pytest.approx(39 / 40)
    assert global_magnitude(scaled, 0.7, least=5)["layer1"] == pytest.approx(35 / 40)
    assert global_magnitude(scaled, 0.7, least=0)["layer1"] == 1.0


def test_a_layer_smaller_than_the_minimum_stays_whole() -> None:
    weights = {"small": torch.tensor([1e-3, 1e-3]), "large": torch.ones(20)}
    assert global_magnitude(weights, 0.5, least=4) == {"small": 0.0, "large": pytest.approx(11 / 20)}


def test_ties_leave_the_earlier_layer_more() -> None:
    weights = {"a": torch.ones(10), "b": torch.ones(10)}
    assert global_magnitude(weights, 0.5) == {"a": pytest.approx(0.1), "b": pytest.approx(0.9)}
    assert lamp(weights, 0.5) == {"a": 0.5, "b": 0.5}  # the scores of equal weights differ


def test_scores_of_unusual_weights() -> None:
    assert lamp_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp_scores(torch.tensor([math.nan, 2.0])).tolist() == [0.0, 1.0]
    assert lamp_scores(torch.tensor([1e-30, -1e30])).tolist() == [pytest.approx(1e-120), 1.0]
    huge = lamp_scores(torch.tensor([1e300, 1e300, math.inf], dtype=torch.float64))
    assert huge.isfinite().all()
    assert lamp({"a": torch.zeros(5), "b": torch.zeros(5)}, 0.8)["b"] == pytest.approx(0.8)


def test_a_joint_selection_takes_what_is_allowed_alone() -> None:
    values = [torch.tensor([9.0, 8.0, 0.0, 0.0]), torch.tensor([7.0, 6.0])]
    among = [torch.tensor([False, True, True, False]), torch.tensor([True, False])]
    assert [m.tolist() for m in keep_largest_jointly(values, 2, among=among)] == [
        [False, True, False, False],
        [True, False],
    ]
    assert [m.tolist() for m in keep_largest_jointly(values, 3, 1, among)] == [m.tolist() for m in among]
    # a tensor keeps its least, or all that is allowed
    one, three = torch.tensor([True, False]), torch.tensor([True, True, True])
    found = keep_largest_jointly([torch.zeros(2), torch.ones(3)], 3, 2, [one, three])
    assert [m.tolist() for m in found] == [[True, False], [True, True, False]]
    with pytest.raises(ValueError, match=r"among= has 1 tensors, and values= has 2. Give one for each"):
        keep_largest_jointly(values, 2, among=among[:1])


@pytest.mark.parametrize("rule", ["global", "lamp"])
def test_shares_of_weights_in_shards_are_those_of_the_whole(rule: str) -> None:
    weights = {"a": drawn(40)["layer0"].view(10, 4), "b": drawn(30, seed=2)["layer0"].view(5, 6) * 3}
    active = {"a": weights["a"] > -1.0, "b": weights["b"] > -2.0}
    meeting = Meeting(3)
    lengths = {"a": [4, 4, 2], "b": [2, 2, 1]}
    shards = {n: parts(w, 0, lengths[n], meeting) for n, w in weights.items()}
    allowed = {n: parts(m, 0, lengths[n], meeting) for n, m in active.items()}
    by_process = [{n: found[rank] for n, found in shards.items()} for rank in range(3)]
    among = [{n: found[rank] for n, found in allowed.items()} for rank in range(3)]
    assert on_each(lambda mine: shares_by(rule, mine, 0.7), by_process) == [shares_by(rule, weights, 0.7)] * 3
    expected = largest_by(rule, weights, 21, active)
    masks = on_each(lambda mine, limits: largest_by(rule, mine, 21, limits), by_process, among)
    for name, mask in expected.items():
        assert torch.equal(torch.cat([found[name] for found in masks]), mask)


# ---------------------------------------------------------------------- by name


def test_names_that_read_weights() -> None:
    assert resolve("global", SHAPES, 0.8, NETWORK) == global_magnitude(NETWORK, 0.8)
    assert resolve("global(0)", SHAPES, 0.8, NETWORK) == global_magnitude(NETWORK, 0.8, least=0)
    assert resolve("global(least=3)", SHAPES, 0.8, NETWORK) == global_magnitude(NETWORK, 0.8, least=3)
    assert resolve("lamp", SHAPES, 0.8, NETWORK) == lamp(NETWORK, 0.8)
    mixed = resolve({"fc": 0.5, "*": "global"}, SHAPES, 0.8, NETWORK)
    assert mixed == {**global_magnitude({n: NETWORK[n] for n in ("conv1", "conv2", "conv3")}, 0.8), "fc": 0.5}
    with pytest.raises(ValueError, match="distribution='lamp' reads weights, and here are shapes alone"):
        resolve("lamp", SHAPES, 0.8)
    with pytest.raises(ValueError, match=r"distribution='global\(x\)' is not known"):
        resolve("global(x)", SHAPES, 0.8, NETWORK)
