"""SET as published: weights of each sign leave separately, and grown weights start at random."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from support.inside import around_updates, parameters_of
from support.nets import Regression, mlp
from support.rig import copied_masks, fit_steps
from support.simulated import Meeting, on_each, parts
from torch import Tensor, nn

from sparse_callbacks import SET, exchange_layers
from sparse_callbacks.core.distributions import epsilon_sparsity
from sparse_callbacks.core.growth import growth_bound, moved_by_sign
from sparse_callbacks.core.sparse_layers import drawn_places
from sparse_callbacks.core.sparse_layers.drawn_places import numbers_of_live
from sparse_callbacks.core.sparse_layers.live_places import places_of
from sparse_callbacks.core.sparse_layers.moved_places import surviving_by_sign
from sparse_callbacks.testing.cases_resume import resumed_differently
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit

# fmt: off
DROP: dict[str, Any] = {
    "weights": [[0.9, -0.05, 0.0, 0.35], [-0.15, 0.0, 0.6, -0.1], [0.0, 0.5, -0.2, 0.0]],
    "zeta": 0.5,
    "after": [[0.9, 0.0, 0.0, 0.0], [-0.15, 0.0, 0.6, 0.0], [0.0, 0.0, -0.2, 0.0]],
    "regrown": 4,
    "by_magnitude": [0.05, 0.1, 0.15, 0.2],
}
# fmt: on
ERDOS_RENYI = {"inputs": 784, "outputs": 1000, "epsilon": 20, "density": 0.0455102041, "connections": 35680}


def published(**more: Any) -> SET:
    given = {"distribution": "uniform", "every": 2, "stop": 40, "drop_fraction": "constant(0.5)", "print_plan": False}
    return SET(**({"sparsity": 0.7, "drop": "signed", "new_weights": "uniform"} | given | more))


def slow(mask: Tensor, weight: Tensor, grow: Tensor, fraction: float) -> Tensor:
    """The mask after an update, position by position in plain Python; of equal numbers the lower position counts more."""
    values, scores = weight.flatten().tolist(), grow.flatten().tolist()
    active = mask.flatten().nonzero().flatten().tolist()
    signs = [[i for i in active if values[i] < 0], [i for i in active if not values[i] < 0]]
    kept: list[int] = []
    for sign in signs:
        # NaN is smaller than every magnitude
        ordered = sorted(sign, key=lambda i: (-(-1.0 if math.isnan(values[i]) else abs(values[i])), i))
        kept += ordered[: len(sign) - int(torch.tensor(len(sign)).float() * torch.tensor(fraction).float())]
    free = sorted((i for i in range(len(values)) if i not in kept), key=lambda i: (-scores[i], i))
    after = torch.zeros(len(values), dtype=torch.bool)
    after[kept + free[: len(active) - len(kept)]] = True
    return after.view(mask.shape)


# ---------------------------------------------------------------------- which weights leave


def test_the_table_of_the_published_drop() -> None:
    weight = torch.tensor(DROP["weights"])
    mask, kept = weight != 0, torch.tensor(DROP["after"]) != 0
    # growth that would take what has just left comes last: nothing else says who has left
    grow = torch.where(mask, 0.0, torch.arange(1.0, 13.0).view(3, 4))
    found = moved_by_sign(mask, weight, grow, DROP["zeta"])
    assert torch.equal(found & mask, kept)
    assert int((found & ~mask).sum()) == DROP["regrown"] == int((mask & ~kept).sum())
    assert sorted(weight[mask].abs().tolist())[:4] == pytest.approx(DROP["by_magnitude"])
    assert not torch.equal(mask & (weight.abs() > 0.2), kept)  # the smallest magnitudes are others


def test_the_table_of_erdos_renyi() -> None:
    shape = {"layer": (ERDOS_RENYI["outputs"], ERDOS_RENYI["inputs"])}
    density = 1 - epsilon_sparsity(shape, ERDOS_RENYI["epsilon"])["layer"]  # type: ignore[arg-type]
    assert density == pytest.approx(ERDOS_RENYI["density"], abs=5e-11)
    model = nn.Sequential(nn.Linear(784, 1000), nn.Linear(1000, 10))
    row = SET(distribution="epsilon(20)").plan(model)["0.weight"]
    assert row.size - (row.zeros or 0) == pytest.approx(ERDOS_RENYI["connections"], abs=1)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 11, generator=source) < 0.3
    weight = (torch.randint(-4, 6, (9, 11), generator=source) * mask).to(
        dtype
    )  # many ties, active zeros, -0.0 among them
    weight[mask & (weight == 0) & (torch.rand(9, 11, generator=source) < 0.5)] = -0.0
    return mask, weight, torch.rand(9, 11, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fraction", [0.0, 0.29, 0.5, 1.0])
def test_an_update_is_that_of_plain_python(fraction: float, dtype: torch.dtype) -> None:
    for seed in range(20):
        mask, weight, grow = drawn(seed, dtype)
        if seed % 4 == 0:
            weight[mask & (grow < 0.1)] = float("nan")
        found = moved_by_sign(mask, weight, grow, fraction)
        assert torch.equal(found, slow(mask, weight, grow, fraction))
        assert int(found.sum()) == int(mask.sum())


@pytest.mark.parametrize(
    ("fraction", "count", "leaving"), [(0.7, 90, 62), (0.35, 180, 62), (0.29, 100, 28), (0.3, 10, 3)]
)
def test_shares_are_truncated_as_plain_python_does(fraction: float, count: int, leaving: int) -> None:
    """0.7 * 90 is 62.99 in double arithmetic, and 63 in float32, by which RigL counts."""
    weight = torch.cat([torch.arange(1.0, count + 1), -torch.arange(1.0, count + 1), torch.zeros(1000)])
    mask = weight != 0
    found = moved_by_sign(mask, weight, torch.where(mask, 0.0, 1.0), fraction)
    assert int((mask & ~found).sum()) == 2 * leaving
    assert len(surviving_by_sign(weight[mask], fraction)) == 2 * (count - leaving)


def test_kernels_in_any_memory_format_lose_the_same() -> None:
    mask, weight, grow = (t[:8, :8].reshape(4, 4, 2, 2) for t in drawn(3))
    plain = moved_by_sign(mask, weight, grow, 0.5)
    last = moved_by_sign(mask, weight.to(memory_format=torch.channels_last), grow, 0.5)
    assert torch.equal(plain, last)


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_lose_what_the_whole_layer_loses(dim: int) -> None:
    lengths = [4, 0, 5] if dim == 0 else [5, 4, 2]
    for seed in range(5):
        tensors = drawn(seed)
        whole = moved_by_sign(*tensors, 0.5)
        meeting = Meeting(3)
        found = on_each(
            lambda m, w, g: moved_by_sign(m, w, g, 0.5), *[parts(t, dim, lengths, meeting) for t in tensors]
        )
        assert torch.equal(torch.cat(found, dim), whole)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_units_of_sparse_storage_are_those_that_masks_keep(fraction: float) -> None:
    for seed in range(20):
        mask, weight, _ = drawn(seed)
        if seed % 4 == 0:
            weight[2] = float("nan")
        nothing_new = torch.where(mask, 0.0, 1.0).double()  # others grow than have left, where there are enough
        kept = moved_by_sign(mask, weight, nothing_new, fraction) & mask
        assert int((~mask).sum()) > int(mask.sum())
        assert torch.equal(surviving_by_sign(weight[mask], fraction), kept[mask].nonzero().flatten())


def test_every_update_of_a_run_is_that_of_plain_python(tmp_path: Path) -> None:
    callback, found = published(seed=4), []

    def before(moment: Any) -> None:
        weights = {n: p.detach().clone() for n, p in parameters_of(callback).items()}
        found.append((moment.step, copied_masks(callback), weights))

    around_updates(callback, before, lambda _: found.append(copied_masks(callback)))
    fit_steps(tmp_path, callback, Regression(), 10)
    assert len(found) >= 8
    unlike_magnitudes = 0
    for (step, masks, weights), after in zip(found[::2], found[1::2], strict=True):
        for name, mask in masks.items():
            numbers = torch.rand(*mask.shape, dtype=torch.float64, generator=callback.generator(name, step))
            assert torch.equal(after[name], slow(mask, weights[name], numbers, 0.5))
            unlike_magnitudes += not torch.equal(after[name], slow(mask, weights[name].abs(), numbers, 0.5))
    assert unlike_magnitudes


# ---------------------------------------------------------------------- what grown weights start from


def values_born(callback: SET, model: nn.Module) -> dict[str, Tensor]:
    """The values of the weights that the first update grows."""
    run = loops.begin(callback, model, loops.sgd(model))
    before = {n: m.clone() for n, m in run.masks.items()}
    loops.loss_of(model, next(iter(loops.data()))).backward()
    run.method.owners.optimizers[0].step()
    return {n: model.get_parameter(n).detach()[m & ~before[n]] for n, m in run.masks.items()}


def test_grown_weights_are_uniform_within_the_bound_of_he() -> None:
    model = nn.Sequential(nn.Linear(12, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 4))
    for name, values in values_born(published(every=1, sparsity=0.5), model).items():
        bound = math.sqrt(6 / model.get_parameter(name).shape[1])
        assert growth_bound(model.get_parameter(name).shape) == pytest.approx(bound)
        assert float(values.abs().max()) <= bound
        if len(values) > 1000:
            deviation = bound / 3**0.5
            # large numbers grow: were these the numbers that choose places, all values would lie near the upper bound
            assert abs(float(values.mean())) < 5 * deviation / len(values) ** 0.5
            assert float(values.std()) == pytest.approx(deviation, rel=0.1)


def test_without_it_they_are_zero() -> None:
    assert not any(v.any() for v in values_born(published(every=1, new_weights="zero"), loops.net()).values())


def test_they_derive_from_seed_step_and_name() -> None:
    first, same, other = (values_born(published(every=1, seed=seed), loops.net()) for seed in (0, 0, 1))
    assert all(len(values) for values in first.values())
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not any(torch.equal(first[n][:2], other[n][:2]) for n in first)


def test_convolutions_count_all_inputs_of_a_kernel() -> None:
    assert growth_bound((8, 6, 3, 3)) == pytest.approx(math.sqrt(6 / 54))


@pytest.mark.parametrize(("storage", "group"), [("sparse", 1), ("grouped", 3)])
def test_live_weights_have_the_numbers_of_their_places(
    storage: Any, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_places, "DRAWN_AT_ONCE", 37)  # several pieces
    blocks, inputs = 5, 23
    units = torch.rand(blocks, inputs, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :6].sort(1).values
    keys = (units + torch.arange(blocks)[:, None] * inputs).flatten()
    places = places_of(storage, blocks * group, inputs, group, keys)
    whole = torch.rand(blocks * group, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    found = numbers_of_live(places, torch.Generator().manual_seed(7))
    assert torch.equal(found, places.read(whole))
    monkeypatch.setattr(drawn_places, "LARGEST_SAME", 10)
    large = numbers_of_live(places, torch.Generator().manual_seed(7))
    assert large.shape == found.shape
    assert 0.0 <= float(large.min()) < float(large.max()) < 1.0


def test_an_empty_layer_has_no_numbers() -> None:
    places = places_of("sparse", 3, 4, 1, torch.empty(0, dtype=torch.int64))
    assert numbers_of_live(places, torch.Generator()).shape == (1, 0)


# ---------------------------------------------------------------------- runs and refusals


def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    after = (1, 3, 4, 9)
    assert resumed_differently(lambda: [published()], tmp_path, after, "adamw") == {b: [] for b in after}
    for change, words in (
        ({"drop": "magnitude"}, r"drop='signed' there and drop='magnitude' here"),
        ({"new_weights": "zero"}, r"new_weights='uniform' there and new_weights='zero' here"),
    ):
        with pytest.raises(ValueError, match=words):
            fit(Classifier(), published(**change), ckpt_path=tmp_path / "3.ckpt")


def test_the_arguments_are_kept_though_a_hook_has_the_name_of_one() -> None:
    made = published()
    assert (made.arguments["drop"], made.arguments["new_weights"]) == ("'signed'", "'uniform'")
    assert "drop='signed'" in repr(made)
    assert "new_weights='uniform'" in repr(made)
    assert SET().arguments["new_weights"] == "'zero'"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"drop": "smallest"}, "drop='smallest' is not known. Give 'magnitude' or 'signed'"),
        ({"new_weights": "random"}, "new_weights='random' is not known. Give 'zero' or 'uniform'"),
        ({"drop": "signed", "pattern": "fan_in/4"}, r"drop='signed' with pattern='fan_in/4': the rows of a group move"),
        ({"drop": "signed", "storage": "grouped"}, r"drop='signed' with storage='grouped': the rows of a group move"),
        ({"drop": "signed", "storage": {"a": "grouped"}}, r"drop='signed' with storage='grouped': the rows of a group"),
    ],
    ids=["drop", "new weights", "pattern", "grouped", "grouped by layer"],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SET(0.5, **arguments)


def test_a_layer_that_came_grouped_is_refused_before_the_first_step() -> None:
    model = mlp(12, 20, 8)
    exchange_layers(SET(0.5, storage="grouped", group=4, distribution="uniform"), model)
    with pytest.raises(ValueError, match=r"drop='signed' with storage='grouped'"):
        loops.begin(published(), model, loops.sgd(model))
