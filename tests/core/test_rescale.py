"""Rescaling of a sparse start: the factors, the variance of a signal, once in a run, and never on trained weights."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from support.loops import net
from torch import Tensor, nn

from sparse_callbacks import CTRE, SET, SNFS, GaP, RigL, SparsityCallback, Static
from sparse_callbacks.core.rescaling import factors
from sparse_callbacks.core.selection import entries

STARTING_SPARSE = [Static, SET, RigL, SNFS, CTRE, GaP]
each_method = pytest.mark.parametrize("make", STARTING_SPARSE, ids=lambda m: m.__name__)
each_kind = pytest.mark.parametrize("rescale", ["layer", "fan_in"])

# worked by hand: two of six, all, and five of six inputs are gone
WEIGHT = torch.tensor(
    [
        [0.14, -0.07, -0.64, 0.46, -0.99, 0.51],
        [0.56, -0.65, 0.78, 0.41, -0.7, -0.92],
        [-0.77, -0.1, -0.45, 0.3, 0.36, -0.53],
    ],
    dtype=torch.float64,
)
MASK = torch.tensor([[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
BY_UNIT = [
    [0.1979898987, 0.0, -0.9050966799, 0.0, 0.0, 0.7212489168],
    [0.56, -0.65, 0.78, 0.41, -0.7, -0.92],
    [0.0, 0.0, 0.0, 0.7348469228, 0.0, 0.0],
]
BY_LAYER = [
    [0.1878297101, 0.0, -0.8586501034, 0.0, 0.0, 0.6842368011],
    [0.7513188404, -0.8720665112, 1.0464798135, 0.5500727225, -0.9391485505, -1.2343095236],
    [0.0, 0.0, 0.0, 0.4024922359, 0.0, 0.0],
]


def begin(method: SparsityCallback, model: nn.Module, **options: Any) -> Any:
    return loops.begin(method, model, loops.sgd(model), **options)


def close_to(found: Tensor, expected: Any) -> bool:
    return torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rescale", "expected"), [("fan_in", BY_UNIT), ("layer", BY_LAYER)])
def test_weights_are_those_of_the_table(rescale: Any, expected: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 3, dtype=torch.float64))
    model[0].weight.data = WEIGHT.clone()
    # the weights of the model are those beside the masks, and nothing says that they are trained
    begin(Static(initial_mask={"0.weight": WEIGHT * MASK}, rescale=rescale, print_plan=False), model)
    assert close_to(model[0].weight.detach(), expected)


def test_factors_of_a_convolution_and_of_a_unit_without_inputs_are_those_of_the_table() -> None:
    (weight, _) = entries(nn.Conv2d(2, 2, (1, 2)))
    mask = torch.tensor([[[[1, 0]], [[1, 1]]], [[[0, 0]], [[1, 0]]]], dtype=torch.bool)
    assert close_to(factors(mask, weight, "fan_in").flatten(), [1.1547005384, 2.0])
    mask[1] = False
    assert close_to(factors(mask, weight, "fan_in").flatten(), [1.1547005384, 1.0])
    assert close_to(factors(torch.zeros_like(mask), weight, "layer"), [[[[1.0]]], [[[1.0]]]])


# ---------------------------------------------------------------------- the signal


def gates(layer: nn.LSTMCell, x: Tensor) -> Tensor:
    return x @ layer.weight_ih.T


SIGNALS = {
    "linear": (lambda: nn.Linear(400, 300, bias=False), (64, 400), 1),
    "convolution": (lambda: nn.Conv2d(32, 48, 3, bias=False), (16, 32, 7, 7), 1),
    "grouped convolution": (lambda: nn.Conv2d(64, 48, 3, groups=2, bias=False), (16, 64, 7, 7), 1),
    "grouped transposed convolution": (lambda: nn.ConvTranspose2d(64, 48, 3, groups=2, bias=False), (16, 64, 9, 9), 1),
    "stacked gates": (lambda: nn.LSTMCell(400, 96, bias=False), (64, 400), 1),
}


@each_kind
@pytest.mark.parametrize("kind", SIGNALS)
def test_the_variance_of_the_signal_is_that_of_the_dense_layer(kind: str, rescale: Any) -> None:
    make, shape, units = SIGNALS[kind]
    torch.manual_seed(0)
    layer = make().double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape, dtype=torch.float64)

    def output() -> Tensor:
        found = (gates(layer, x) if isinstance(layer, nn.LSTMCell) else layer(x)).detach()
        if kind.endswith("transposed convolution"):
            found = found[:, :, 2:-2, 2:-2]  # at the border fewer inputs reach an output
        return found.transpose(0, units).flatten(1)

    dense = output().var(1).mean()
    begin(Static(0.8, distribution="uniform", include="weight*", rescale=rescale, print_plan=False), layer)
    sparse = output().var(1)
    assert sparse.mean() == pytest.approx(float(dense), rel=0.1)  # over some 100 units of 80 inputs: 1 / sqrt(100 * 40)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_by_fan_in_every_unit_has_the_variance_of_a_dense_one(groups: int, transposed: bool) -> None:
    """Counted through the layer itself: each unit's sum of squared weights that a constant input meets."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 12, 3, groups=groups, bias=False, dtype=torch.float64)
    nn.init.ones_(layer.weight)
    begin(Static(0.8, distribution="uniform", rescale="fan_in", print_plan=False), layer)
    # with squared weights as weights and ones as input an output in the middle is the variance of its unit
    squared = copy.deepcopy(layer)
    squared.weight.data.square_()
    found = squared(torch.ones(1, 8, 9, 9, dtype=torch.float64)).detach()[0, :, 4, 4]
    assert torch.allclose(found, torch.full_like(found, 9 * 8 / groups))


@each_kind
def test_stacked_layers_are_rescaled_each_by_its_own_density(rescale: Any) -> None:
    layer = nn.MultiheadAttention(24, 2, bias=False)
    nn.init.ones_(layer.in_proj_weight)
    levels = {f"in_proj_weight[[]{i}]": share for i, share in enumerate((0.5, 0.75, 0.0))}
    method = Static(0.5, distribution={**levels, "*": 0.5}, rescale=rescale, include="in_proj*", print_plan=False)
    begin(method, layer)
    squares = [part.square().mean() for part in layer.in_proj_weight.detach().chunk(3)]
    assert squares == pytest.approx([1.0, 1.0, 1.0])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_product_once(dtype: torch.dtype, rescale: Any) -> None:
    model, wide = net().to(dtype), net().to(dtype).double()
    run = begin(Static(0.8, rescale=rescale, print_plan=False), model)
    begin(Static(0.8, rescale=rescale, print_plan=False), wide)
    for name in run.masks:
        once = wide.get_parameter(name).detach().to(dtype)
        # but for some that lie between two numbers, for which float32 has decided
        assert (model.get_parameter(name) == once).float().mean() > 0.99


# ---------------------------------------------------------------------- once


@each_method
@each_kind
def test_each_method_rescales_what_its_first_mask_keeps(make: Any, rescale: Any) -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = begin(make(0.7, rescale=rescale, print_plan=False), model)
    for name, p in model.named_parameters():
        if name not in run.masks:
            assert torch.equal(p, before[name])  # biases
            continue
        mask, kept = run.masks[name], p.detach()
        share = mask.sum(1, keepdim=True) / mask.shape[1] if rescale == "fan_in" else mask.float().mean()
        expected = torch.where(mask, before[name] / share.sqrt(), 0.0)
        assert torch.allclose(kept, expected, rtol=1e-6)


def test_weights_stay_as_they_are_by_default() -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = begin(Static(0.7, print_plan=False), model)
    assert all(torch.equal(model.get_parameter(n), before[n] * m) for n, m in run.masks.items())


def test_a_run_that_goes_on_is_not_rescaled() -> None:
    model = net()
    run = begin(RigL(0.7, every=4, rescale="fan_in", print_plan=False), model)
    saved = [(run.state_dict(), copy.deepcopy(model.state_dict()))]  # before the first step
    loops.train(run, model, run.method.owners.optimizers[0], 0, 3)
    saved.append((run.state_dict(), copy.deepcopy(model.state_dict())))
    run.__exit__(KeyboardInterrupt, None, None)
    for state, weights in saved:
        assert state["arguments"]["rescale"] == "'fan_in'"
        other = net(seed=1)
        other.load_state_dict(weights)
        begin(RigL(0.7, every=4, rescale="fan_in", print_plan=False), other, state=state)
        assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items())


def test_a_second_run_of_the_same_model_is_not_rescaled() -> None:
    model, method = net(), Static(0.7, rescale="layer", print_plan=False)
    with begin(method, model) as run:
        loops.train(run, model, method.owners.optimizers[0], 0, 3)
    weights = copy.deepcopy(model.state_dict())
    begin(method, model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_state_that_is_loaded_into_a_run_finds_the_weights_as_they_were() -> None:
    model = net()
    first = begin(SET(0.7, rescale="fan_in", print_plan=False), model)
    state, weights = first.state_dict(), copy.deepcopy(model.state_dict())
    first.__exit__(KeyboardInterrupt, None, None)
    other = net()
    run = begin(SET(0.7, rescale="fan_in", print_plan=False), other)
    other.load_state_dict(weights)
    run.load_state_dict(state)
    assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items())


# ---------------------------------------------------------------------- trained weights


def with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("start", ["random", "magnitude", "nonzero"])
def test_weights_under_a_norm_that_has_counted_batches_are_refused(start: str) -> None:
    model = with_norm()
    model(torch.randn(6, 12))
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    nn.utils.prune.remove(model[0], "weight")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"rescale='layer' is for fresh weights, and those of the model are trained: 1 has counted batches",
    ):
        begin(RigL(initial_mask=start, rescale="layer", print_plan=False), model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_weights_of_a_pruned_network_are_refused(start: str) -> None:
    model = net()
    with begin(Static(0.7, rescale="layer", print_plan=False), model):
        pass
    with pytest.raises(
        ValueError, match=r"those of the model are trained: 69\.8% of them are zero, as a pruned network"
    ):
        begin(Static(0.7, initial_mask=start, rescale="layer", print_plan=False), model)


def test_weights_that_a_trained_checkpoint_holds_are_refused_and_others_of_its_masks_are_not(tmp_path: Path) -> None:
    model = net()
    with begin(Static(0.7, print_plan=False), model) as run:
        loops.train(run, model, run.method.owners.optimizers[0], 0, 2)
        torch.save({"net": model.state_dict(), "run": run.state_dict()}, tmp_path / "last.pt")
    method = SET(initial_mask=tmp_path / "last.pt", rescale="fan_in", print_plan=False)
    with pytest.raises(ValueError, match=r"0\.weight is as in the checkpoint of a trained network"):
        begin(method, model)
    rewound, fresh = net(), net()
    masks = begin(method, rewound).masks
    for name, mask in masks.items():
        share = mask.sum(1, keepdim=True) / mask.shape[1]
        expected = torch.where(mask, fresh.get_parameter(name).detach() / share.sqrt(), 0.0)
        assert torch.allclose(rewound.get_parameter(name).detach(), expected, rtol=1e-6)


@pytest.mark.parametrize("given", ["nonzero", "a state dict"])
def test_weights_that_given_masks_have_pruned_already_are_refused(given: str) -> None:
    model = net()
    with begin(Static(0.7, print_plan=False), model):
        pass
    start: Any = given if given == "nonzero" else copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="they are zero already where the given masks are"):
        begin(SET(initial_mask=start, rescale="layer", print_plan=False), model)
    rewound = net()
    if given != "nonzero":  # the weights that it began with, once
        begin(SET(initial_mask=start, rescale="layer", print_plan=False), rewound).close()
        with pytest.raises(ValueError, match="they are zero already where the given masks are"):
            begin(SET(initial_mask=start, rescale="layer", print_plan=False), rewound)


# ---------------------------------------------------------------------- who should know of it


def plain(width: int = 100) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def test_layers_that_keep_few_inputs_are_named_with_the_argument() -> None:
    with pytest.warns(
        UserWarning,
        match=r"few inputs are left for each output of 0\.weight \(1\.3\), 2\.weight \(2\.0\), 4\.weight \(2\.0\), with "
        r"no norm in between.*Static\(rescale='fan_in'\) makes fresh weights larger",
    ):
        begin(Static(0.98, distribution="uniform", print_plan=False), plain())


def test_usual_networks_are_not_spoken_of() -> None:
    normed = nn.Sequential(nn.Linear(64, 100), nn.LayerNorm(100), nn.ReLU(), nn.Linear(100, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(Static(0.98, distribution="uniform", rescale="fan_in", print_plan=False), plain())
        begin(Static(0.98, distribution="uniform", print_plan=False), normed)
        begin(Static(0.9, print_plan=False), nn.Sequential(nn.Flatten(), *plain(300)))
        begin(Static(0.5, print_plan=False), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_a_norm_before_layers_without_any_hides_them_not(start: str) -> None:
    with pytest.warns(UserWarning, match=r"few inputs are left for each output of 1\.0\.weight"):
        begin(
            Static(0.98, distribution="uniform", initial_mask=start, print_plan=False),
            nn.Sequential(nn.BatchNorm1d(64), plain()),
        )
