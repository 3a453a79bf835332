"""Sparsities per layer against the reference numbers, and what a `distribution` argument may be."""

import math
from typing import Any

import pytest
from oracles.ctre import ER_DENSITY
from oracles.rigl import ERK, ERK_RESNET50

from sparse_callbacks import distributions
from sparse_callbacks.core.distributions import (
    clipped,
    epsilon_sparsity,
    erdos_renyi,
    erdos_renyi_kernel,
    is_epsilon,
    resolve,
    uniform,
)
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.methods import GMP, EarlyCroP, PruneAtStart, Static

SHAPES = {"body.0": (32, 16, 3, 3), "body.1": (64, 32, 3, 3), "head": (10, 64)}


@pytest.mark.parametrize("case", ERK)
def test_erdos_renyi_as_in_the_reference(case: str) -> None:
    expected = ERK[case]
    shapes = {str(i): tuple(shape) for i, shape in enumerate(expected["shapes"])}
    share = erdos_renyi if case.endswith("_ER") else erdos_renyi_kernel
    power = expected.get("erk_power_scale", 1.0)
    found = share(shapes, expected["target_sparsity"], custom=expected.get("custom_sparsity"), power=power)
    assert list(found) == list(shapes)
    assert list(found.values()) == pytest.approx(expected["layer_sparsity"], abs=1e-10)  # 10 digits are given
    sizes = [math.prod(shape) for shape in shapes.values()]
    active = [size - zeros_for(sparsity, size) for size, sparsity in zip(sizes, found.values(), strict=True)]
    assert active == expected["n_active_after_floor"]
    assert sizes == expected["n_params"]
    assert sum(active) == expected["total_active"]
    assert sum(sizes) == expected["total_params"]


LAYERS = {name: (tuple(shape), side) for name, shape, side in ERK_RESNET50["model"]["layers"]}
RESNET50 = {name: shape for name, (shape, _) in LAYERS.items()}


def macs(name: str) -> int:
    """Multiply-accumulates of a layer on one 224x224 image, by its output's side (the stride sits on the 3x3)."""
    shape, side = LAYERS[name]
    return math.prod(shape) * side * side


def test_the_dense_resnet50_as_in_the_reference() -> None:
    assert sum(math.prod(shape) for shape in RESNET50.values()) == ERK_RESNET50["model"]["params"]
    assert sum(map(macs, LAYERS)) / 1e9 == ERK_RESNET50["model"]["dense_gmac"]


@pytest.mark.parametrize("case", [key for key in ERK_RESNET50 if key != "model"])
def test_resnet50_as_in_the_reference(case: str) -> None:
    expected = ERK_RESNET50[case]
    sparsity = float(case.split("_")[0][1:])
    share = uniform if "uniform" in case else erdos_renyi_kernel
    found = share(RESNET50, sparsity, custom={"conv1": 0.0} if case.endswith("conv1_dense") else None)
    flops = sum((1 - found[name]) * macs(name) for name in LAYERS) / sum(map(macs, LAYERS))
    weights = sum(zeros_for(found[n], math.prod(s)) for n, s in RESNET50.items()) / ERK_RESNET50["model"]["params"]
    # the reference rounds to 5 and 6 digits and counts zeros without floors: at most 54 of 25.5 M weights apart
    assert flops == pytest.approx(expected["flops_fraction_of_dense"], abs=6e-6)
    assert weights == pytest.approx(expected["overall_sparsity"], abs=3e-6)
    if "dense_layers" in expected:
        assert [name for name, s in found.items() if s == 0.0] == expected["dense_layers"]
        for name in ("conv1", "fc", "s4b2_3x3", "s1b0_1x1a"):
            assert 1 - found[name] == pytest.approx(expected[f"density_{name}"], abs=6e-7)


def test_tied_layers_go_dense_together() -> None:
    found = erdos_renyi_kernel({"a": (4, 4), "big": (1000, 1000), "b": (4, 4)}, 0.5)
    assert found["a"] == found["b"] == 0.0 < found["big"]


@pytest.mark.parametrize("share", [uniform, erdos_renyi, erdos_renyi_kernel])
def test_sparsity_zero_leaves_every_layer_dense(share: Any) -> None:
    assert share(SHAPES, 0.0) == pytest.approx(
        dict.fromkeys(SHAPES, 0.0), abs=1e-12
    )  # the budget is divided and multiplied
    assert share({}, 0.5) == {}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("share", [uniform, erdos_renyi, erdos_renyi_kernel])
def test_the_target_is_met_within_two_weights_per_layer(share: Any, sparsity: float) -> None:
    found = share(SHAPES, sparsity)
    zeros = sum(zeros_for(found[name], math.prod(shape)) for name, shape in SHAPES.items())
    # one for the floor in the budget, one for the floor of the layer's own zeros
    assert abs(zeros - sparsity * sum(math.prod(shape) for shape in SHAPES.values())) < 2 * len(SHAPES)
    assert all(0.0 <= value < 1.0 for value in found.values())


def test_custom_layers_keep_their_sparsity_and_leave_the_budget() -> None:
    rest = {name: shape for name, shape in SHAPES.items() if name != "head"}
    for share in (uniform, erdos_renyi, erdos_renyi_kernel):
        assert share(SHAPES, 0.8, custom={"head": 0.25}) == {**share(rest, 0.8), "head": 0.25}


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1, 1.5, math.nan, True, "0.9", None])
def test_sparsities_outside_the_range_are_refused(sparsity: Any) -> None:
    for attempt in (
        lambda: uniform(SHAPES, sparsity),
        lambda: erdos_renyi(SHAPES, sparsity),
        lambda: erdos_renyi_kernel(SHAPES, sparsity),
        lambda: resolve("uniform", SHAPES, sparsity),
        lambda: resolve(uniform, SHAPES, sparsity),
    ):
        with pytest.raises(ValueError, match=r"sparsity=.* is not in \[0, 1\): it is the fraction of zeros"):
            attempt()
    with pytest.raises(ValueError, match=r"custom: the sparsity .* of head is not in \[0, 1\)"):
        uniform(SHAPES, 0.5, custom={"head": sparsity})


def test_custom_names_must_be_layers() -> None:
    with pytest.raises(ValueError, match=r"custom names layers that do not exist: tail. Layers: body.0, body.1, head"):
        erdos_renyi_kernel(SHAPES, 0.5, custom={"tail": 0.5})


def test_empty_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head with shape \(0, 4\) has no weight to prune"):
        erdos_renyi_kernel({"head": (0, 4)}, 0.5)


@pytest.mark.parametrize("name", ["uniform", "erdos_renyi", "erdos_renyi_kernel"])
def test_resolve_by_name(name: str) -> None:
    assert resolve(name, SHAPES, 0.8) == getattr(distributions, name)(SHAPES, 0.8)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for distribution in ("erk", {"*": "erk"}):
        with pytest.raises(
            ValueError,
            match=r"'erk' is not known. Use uniform, uniform_plus, erdos_renyi, erdos_renyi_kernel, global, lamp, a mapping",
        ):
            resolve(distribution, SHAPES, 0.8)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [Static, GMP, PruneAtStart, EarlyCroP], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ("erk", r"distribution='erk' is not known. Use uniform"),
        ({"head": 0.5, "*": "erk"}, r"distribution='erk' is not known. Use uniform"),
        ("global(x)", r"distribution='global\(x\)' is not known. Give 'global\(2\)'"),
        ("epsilon(0)", r"epsilon=0.0 is not a positive number"),
        ("epsilon", r"epsilon='epsilon' is not a positive number"),
    ],
)
def test_a_method_refuses_names_before_there_is_a_model(method: Any, distribution: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(distribution=distribution)


def test_resolve_by_glob_takes_the_first_match() -> None:
    found = resolve({"*.1": 0.25, "body.*": 0.5}, SHAPES, 0.8)
    assert found == {"body.0": 0.5, "body.1": 0.25, "head": 0.8}
    assert list(found) == list(SHAPES)


def test_the_rest_of_a_mapping_shares_the_target() -> None:
    found = resolve({"head": 0.0, "*": "erdos_renyi_kernel"}, SHAPES, 0.8)
    assert found == erdos_renyi_kernel(SHAPES, 0.8, custom={"head": 0.0})
    mixed = resolve({"body.*": "erdos_renyi", "*": "uniform"}, SHAPES, 0.8)
    assert mixed == {**erdos_renyi({n: SHAPES[n] for n in ("body.0", "body.1")}, 0.8), "head": 0.8}
    assert resolve({"body.*": 0.5, "head": 0.2, "*": "uniform"}, SHAPES, 0.8)["head"] == 0.2


def test_globs_without_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'tail\*' matches no sparse layer. Candidates: body.0, body.1, head"):
        resolve({"tail*": 0.5}, SHAPES, 0.8)
    with pytest.raises(ValueError, match=r"'head' decides no layer, because earlier patterns take all its matches"):
        resolve({"*": "uniform", "head": 0.5}, SHAPES, 0.8)


@pytest.mark.parametrize("value", [1.0, -0.5, True, None])
def test_sparsities_of_globs_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"distribution: the sparsity .* of 'head' is not in \[0, 1\)"):
        resolve({"head": value}, SHAPES, 0.8)


def test_resolve_by_callable() -> None:
    def half(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
        return dict.fromkeys(reversed(shapes), sparsity / 2)

    found = resolve(half, SHAPES, 0.8)
    assert found == dict.fromkeys(SHAPES, 0.4)
    assert list(found) == list(SHAPES)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "the callable returned None. It must return a dict"),
        ({"head": 0.5}, r"missing \['body.0', 'body.1'\], unknown \[\]"),
        ({**dict.fromkeys(SHAPES, 0.5), "tail": 0.5}, r"missing \[\], unknown \['tail'\]"),
        ({**dict.fromkeys(SHAPES, 0.5), "head": 1.0}, r"the callable's sparsity 1.0 of head is not in \[0, 1\)"),
    ],
)
def test_what_a_callable_returns_is_checked(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(lambda shapes, sparsity: result, SHAPES, 0.8)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"distribution=0.5 is neither a name"):
        resolve(0.5, SHAPES, 0.8)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["uniform", "erdos_renyi", "erdos_renyi_kernel"])
def test_a_target_out_of_reach_is_refused_with_the_highest_one(name: str) -> None:
    shapes = {"a": (2, 5), "b": (5, 2)}
    for distribution in (name, {"*": name}, getattr(distributions, name)):
        assert resolve(distribution, shapes, 0.9) == pytest.approx({"a": 0.9, "b": 0.9})
        with pytest.raises(
            ValueError, match=r"sparsity=0.95 cannot be reached: each of the 2 layers .* sparsity is 0.9:"
        ):
            resolve(distribution, shapes, 0.95)


# ---------------------------------------------------------------------- epsilon


def layered(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = case["n_hidden"]
    widths = [case["dim"], hidden, hidden, hidden, case["n_classes"]]
    return {f"fc{i}": (widths[i + 1], widths[i]) for i in range(4)}


@pytest.mark.parametrize(
    "case", ER_DENSITY, ids=lambda c: f"{c['dim']}-{c['n_hidden']}-{c['n_classes']}-{c['epsilon']}"
)
def test_epsilon_as_in_the_reference(case: dict[str, Any]) -> None:
    shapes = layered(case)
    found = epsilon_sparsity(shapes, case["epsilon"])
    assert list(found.values()) == pytest.approx(case["layer_sparsity"], abs=1e-10)  # 10 digits are given
    active = [math.prod(s) - zeros_for(found[n], math.prod(s)) for n, s in shapes.items()]
    assert active == case["n_active"]
    assert sum(active) == case["total_active"]
    text = f"epsilon({case['epsilon']})"
    assert resolve(text, shapes, 0.9) == resolve(text, shapes, 0.1) == found  # the target has nothing to say
    assert clipped(text, shapes) == [n for n in shapes if n == "fc3" and case["uncapped_last"] < 0]


def test_every_layer_denser_than_dense_is_dense() -> None:
    shapes = {"a": (100, 100), "b": (4, 100), "c": (2, 2)}
    assert epsilon_sparsity(shapes, 10) == pytest.approx({"a": 0.8, "b": 0.0, "c": 0.0})
    assert clipped("epsilon(10)", shapes) == ["b", "c"]
    assert clipped({"c": 0.5, "*": "epsilon(10)"}, shapes) == ["b"]
    assert clipped({"b": "uniform", "a": "epsilon(60)"}, shapes) == ["a"]
    assert clipped("uniform", shapes) == clipped(uniform, shapes) == []


def test_a_kernel_counts_its_positions_as_inputs() -> None:
    assert epsilon_sparsity({"conv": (32, 16, 3, 3)}, 2) == epsilon_sparsity({"conv": (32, 144)}, 2)


def test_epsilon_wherever_a_name_is_allowed() -> None:
    own = epsilon_sparsity(SHAPES, 5.5)
    assert resolve(" epsilon( 5.5 ) ", SHAPES, 0.9) == resolve("epsilon(.55e1)", SHAPES, 0.9) == own
    assert resolve({"head": 0.25, "*": "epsilon(5.5)"}, SHAPES, 0.9) == {**own, "head": 0.25}
    mixed = resolve({"head": "epsilon(5.5)", "*": "uniform"}, SHAPES, 0.9)
    assert mixed == {"body.0": 0.9, "body.1": 0.9, "head": own["head"]}


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        ("epsilon(1)", True),
        (" epsilon(5.5)", True),
        ("uniform", False),
        (uniform, False),
        ({"*": "epsilon(1)"}, True),
        ({"head": 0.5, "*": "epsilon(1)"}, True),
        ({"head": "epsilon(1)"}, False),  # the other layers follow the target
        ({"head": "uniform", "*": "epsilon(1)"}, False),
        ({"*": 0.5}, False),
    ],
)
def test_where_epsilon_leaves_nothing_to_a_target(distribution: Any, expected: bool) -> None:
    assert is_epsilon(distribution) == expected


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, math.nan, True, "1", None])
def test_an_epsilon_that_is_no_positive_number_is_refused(epsilon: Any) -> None:
    with pytest.raises(ValueError, match=r"epsilon=.* is not a positive number.*distribution=\"epsilon\(1\)\""):
        epsilon_sparsity(SHAPES, epsilon)


@pytest.mark.parametrize(
    "text", ["epsilon", *(f"epsilon({inside}" for inside in (")", "x)", "0)", "-1)", "1", "1)(2)", "1.2.3)"))]
)
def test_a_text_without_a_positive_number_is_refused(text: str) -> None:
    for distribution in (text, {"*": text}):
        with pytest.raises(ValueError, match=r"is not a positive number"):
            resolve(distribution, SHAPES, 0.9)


def test_less_than_one_connection_is_refused_with_the_smallest_epsilon() -> None:
    with pytest.raises(
        ValueError, match=r"epsilon=0\.01 leaves b with shape \(2, 3\) less than one connection\. Give at least 0\.2"
    ):
        epsilon_sparsity({"a": (100, 100), "b": (2, 3)}, 0.01)
