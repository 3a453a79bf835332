"""What moved in a network over time: a table worked by hand, slow counts of random masks, and exchanged layers."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support import sparse_layers
from torch import Tensor, nn

from sparse_callbacks import SparseLinear
from sparse_callbacks.core.packed_bits import count_of_bits, packed, unpacked
from sparse_callbacks.core.record import layer_history
from sparse_callbacks.core.record.chains import component_sizes, links_of, paths_of
from sparse_callbacks.core.record.fans import fans_of_mask, spread
from sparse_callbacks.core.record.topology_statistics import TopologyHistory
from sparse_callbacks.core.selection import Entry, select
from sparse_callbacks.core.shards import Shards, lie_as
from sparse_callbacks.core.weights import SparseWeights

MASKS = [
    [["010", "010", "111", "001"], ["0000", "0010", "1000", "1111"], ["0110", "0100"]],
    [["011", "110", "010", "001"], ["0000", "1010", "0100", "1011"], ["1010", "1000"]],
    [["110", "110", "010", "000"], ["0000", "1010", "1100", "0001"], ["0010", "0100"]],
    [["111", "100", "010", "010"], ["0000", "1010", "1100", "1010"], ["1110", "0000"]],
]
EXPECTED: list[dict[str, Any]] = [
    {
        "step": 0,
        "jaccard_distance_to_previous": None,
        "jaccard_distance_to_first": 0.0,
        "churn": None,
        "ever_active_share_R": 0.4166666667,
        "ages": {0: 15},
        "mean_age": 0.0,
        "fan_in_histogram": [{1: 3, 3: 1}, {0: 1, 1: 2, 4: 1}, {1: 1, 2: 1}],
        "fan_out_histogram": [{1: 1, 2: 1, 3: 1}, {1: 2, 2: 2}, {0: 2, 1: 1, 2: 1}],
        "hidden_units_without_input": [[], [0]],
        "hidden_units_without_output": [[], [0, 3]],
        "dead_units": 2,
        "hidden_units_on_no_path": [[1, 3], [0, 3]],
        "paths": 7,
        "connections_on_a_path": 9,
        "connected_components": 2,
        "component_sizes": [12, 1],
    },
    {
        "step": 100,
        "jaccard_distance_to_previous": 0.5714285714,
        "jaccard_distance_to_first": 0.5714285714,
        "churn": 0.4,
        "ever_active_share_R": 0.5833333333,
        "ages": {0: 6, 100: 9},
        "mean_age": 60.0,
        "fan_in_histogram": [{1: 2, 2: 2}, {0: 1, 1: 1, 2: 1, 3: 1}, {1: 1, 2: 1}],
        "fan_out_histogram": [{1: 1, 2: 1, 3: 1}, {1: 2, 2: 2}, {0: 2, 1: 1, 2: 1}],
        "hidden_units_without_input": [[], [0]],
        "hidden_units_without_output": [[], [1, 3]],
        "dead_units": 3,
        "hidden_units_on_no_path": [[0, 2, 3], [0, 1, 3]],
        "paths": 2,
        "connections_on_a_path": 4,
        "connected_components": 1,
        "component_sizes": [13],
    },
    {
        "step": 200,
        "jaccard_distance_to_previous": 0.5,
        "jaccard_distance_to_first": 0.5789473684,
        "churn": 0.25,
        "ever_active_share_R": 0.6111111111,
        "ages": {0: 3, 100: 3, 200: 6},
        "mean_age": 125.0,
        "fan_in_histogram": [{0: 1, 1: 1, 2: 2}, {0: 1, 1: 1, 2: 2}, {1: 2}],
        "fan_out_histogram": [{0: 1, 2: 1, 3: 1}, {1: 3, 2: 1}, {0: 2, 1: 2}],
        "hidden_units_without_input": [[3], [0]],
        "hidden_units_without_output": [[], [0, 3]],
        "dead_units": 3,
        "hidden_units_on_no_path": [[3], [0, 3]],
        "paths": 7,
        "connections_on_a_path": 11,
        "connected_components": 4,
        "component_sizes": [9, 2, 1, 1],
    },
    {
        "step": 300,
        "jaccard_distance_to_previous": 0.5,
        "jaccard_distance_to_first": 0.6363636364,
        "churn": 0.4,
        "ever_active_share_R": 0.6388888889,
        "ages": {0: 6, 100: 2, 200: 3, 300: 4},
        "mean_age": 133.3333333333,
        "fan_in_histogram": [{1: 3, 3: 1}, {0: 1, 2: 3}, {0: 1, 3: 1}],
        "fan_out_histogram": [{1: 1, 2: 1, 3: 1}, {0: 1, 1: 1, 2: 1, 3: 1}, {0: 1, 1: 3}],
        "hidden_units_without_input": [[], [0]],
        "hidden_units_without_output": [[3], [3]],
        "dead_units": 3,
        "hidden_units_on_no_path": [[3], [0, 3]],
        "paths": 8,
        "connections_on_a_path": 11,
        "connected_components": 2,
        "component_sizes": [12, 1],
    },
]
NAMES = ["0.weight", "1.weight", "2.weight"]
TOLERANCE = 1e-9  # of shares that are written down with ten digits


def as_mask(rows: Sequence[str]) -> Tensor:
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def weights_of(model: nn.Module, masks: Mapping[str, Tensor], layers: Mapping[str, SparseLinear] | None = None) -> Any:
    entries = {e.name: e for e in select(model, ["*weight"], None, None) if not e.reason}
    params = {name: p for name, p in model.named_parameters() if name in entries}
    return SparseWeights(params, entries, masks, layers)


def chain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def histogram(numbers: Tensor) -> dict[int, int]:
    return dict(sorted(Counter(numbers.tolist()).items()))


def test_a_chain_of_three_layers_moves_as_it_was_worked_by_hand() -> None:
    model = chain_net()
    history = TopologyHistory(model)
    for masks, expected in zip(MASKS, EXPECTED, strict=True):
        given = dict(zip(NAMES, map(as_mask, masks), strict=True))
        weights = weights_of(model, given)
        figures, layers = history.look(expected["step"], [weights])
        names = {
            "churn": "churn",
            "distance_previous": "jaccard_distance_to_previous",
            "distance_first": "jaccard_distance_to_first",
            "ever_active": "ever_active_share_R",
            "mean_age": "mean_age",
        }
        for mine, theirs in names.items():
            assert figures[f"topology/{mine}"] == pytest.approx(expected[theirs], abs=TOLERANCE), (
                mine,
                expected["step"],
            )
        state, ages = history.state(), Counter[int]()
        for name in NAMES:
            ages.update((expected["step"] - state["steps"][state[f"births/{name}"].long()]).tolist())
        assert dict(sorted(ages.items())) == expected["ages"]
        for index, name in enumerate(NAMES):
            fans = fans_of_mask(given[name], weights.entries[name])
            assert histogram(fans.fan_in) == expected["fan_in_histogram"][index]
            assert histogram(fans.fan_out) == expected["fan_out_histogram"][index]
            assert layers[name]["active"] == int(given[name].sum())
            assert layers[name]["fan_in"] == spread(fans.fan_in)


def units(truths: Sequence[Tensor]) -> list[list[int]]:
    return [t.nonzero().flatten().tolist() for t in truths]


@pytest.mark.parametrize("index", range(len(MASKS)))
def test_paths_of_a_chain_are_those_that_were_worked_by_hand(index: int) -> None:
    model, expected = chain_net(), EXPECTED[index]
    weights = weights_of(model, dict(zip(NAMES, map(as_mask, MASKS[index]), strict=True)))
    chain = links_of(NAMES, [weights], model)
    found = paths_of(chain)
    assert units(found.without_input) == expected["hidden_units_without_input"]
    assert units(found.without_output) == expected["hidden_units_without_output"]
    assert units(found.off_path) == expected["hidden_units_on_no_path"]
    assert (found.dead_units, found.paths) == (expected["dead_units"], expected["paths"])
    assert found.connections == expected["connections_on_a_path"]
    sizes = component_sizes(chain)
    assert (sizes, len(sizes)) == (expected["component_sizes"], expected["connected_components"])


# ---------------------------------------------------------------------- against slow counts


def slow_figures(past: Sequence[Mapping[str, Tensor]], steps: Sequence[int]) -> dict[str, float | None]:
    """The same by sets of positions and a loop over them."""
    sets = [{(n, i) for n, m in masks.items() for i in m.flatten().nonzero().flatten().tolist()} for masks in past]
    now, size = sets[-1], sum(m.numel() for m in past[-1].values())
    born: dict[tuple[str, int], int] = {}
    for before, positions, step in zip([set(), *sets], sets, steps, strict=False):
        born = {p: born[p] if p in before else step for p in positions}

    def distance(a: set[Any], b: set[Any]) -> float:
        return len(a ^ b) / len(a | b) if a | b else 0.0

    looked = len(sets) > 1
    return {
        "topology/churn": (len(now - sets[-2]) / len(now) if now else 0.0) if looked else None,
        "topology/distance_previous": distance(now, sets[-2]) if looked else None,
        "topology/distance_first": distance(now, sets[0]),
        "topology/ever_active": len(set().union(*sets)) / size,
        "topology/mean_age": sum(steps[-1] - born[p] for p in now) / len(now) if now else 0.0,
    }


def drawn_masks(model: nn.Module, density: float, source: torch.Generator) -> dict[str, Tensor]:
    return {
        n: torch.rand(p.shape, generator=source) < density for n, p in model.named_parameters() if n.endswith("weight")
    }


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_have_the_statistics_of_a_slow_count(seed: int) -> None:
    draw, source = random.Random(seed), torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(draw.randint(1, 9), 5), nn.Conv2d(2, 3, (1, draw.randint(1, 3))))
    history, past, steps = TopologyHistory(model), [], []
    for _ in range(5):
        # some looks find nothing new, some nothing active
        masks = past[-1] if past and draw.random() < 0.2 else drawn_masks(model, draw.choice([0, 0.2, 0.6]), source)
        past.append(masks)
        steps.append((steps[-1] if steps else 0) + draw.randint(0, 30))
        figures, layers = history.look(steps[-1], [weights_of(model, masks)])
        expected = slow_figures(past, steps)
        assert {key: figures[key] for key in expected} == pytest.approx(expected)
        for name in masks:
            mine = slow_figures([{name: m[name]} for m in past], steps)
            assert {f"topology/{k}": layers[name][k] for k in ("churn", "ever_active", "mean_age")} == pytest.approx(
                {k: v for k, v in mine.items() if k in ("topology/churn", "topology/ever_active", "topology/mean_age")}
            )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv1d(4, 4, 2, groups=4),
        nn.ConvTranspose2d(4, 6, 2),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Linear(5, 7),
    ],
    ids=["conv", "grouped", "depthwise", "transposed", "transposed grouped", "linear"],
)
def test_fans_are_the_channels_that_a_weight_of_one_changes(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    mask = drawn_masks(model, 0.25, torch.Generator().manual_seed(1))["0.weight"]
    entry = next(e for e in select(model, ["*weight"], None, None) if e.name == "0.weight")
    fans = fans_of_mask(mask, entry, getattr(layer, "groups", 1))
    with torch.no_grad():
        layer.weight.copy_(mask)
        layer.bias.zero_()
    inputs = 5 if isinstance(layer, nn.Linear) else 4
    reads = []
    for channel in range(inputs):
        x = torch.zeros(1, inputs, *(() if isinstance(layer, nn.Linear) else [4] * (layer.weight.ndim - 2)))
        x[0, channel] = 1
        y = layer(x)[0]
        reads.append(y != 0 if y.ndim == 1 else y.flatten(1).any(1))
    table = torch.stack(reads).int()  # input channels x output channels
    assert fans.fan_out.tolist() == table.sum(1).tolist()
    assert fans.fan_in.tolist() == table.sum(0).tolist()


@pytest.mark.parametrize("many", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_packed_bits_come_back_and_are_counted(many: int) -> None:
    truths = torch.rand(many + 3, generator=torch.Generator().manual_seed(many))[3:] < 0.4  # a view with an offset
    field = packed(truths)
    assert field.numel() == -(-many // 8)
    assert torch.equal(unpacked(field, many), truths)
    assert count_of_bits(field) == int(truths.sum())


# ---------------------------------------------------------------------- exchanged layers


def exchanged(storage: str, seed: int, group: int = sparse_layers.GROUP) -> tuple[nn.Module, dict[str, SparseLinear]]:
    mask = sparse_layers.mask_of(storage, seed=seed)
    made = SparseLinear.from_dense(nn.Linear(10, 12), mask, storage=storage, group=group)  # type: ignore[arg-type]
    return nn.Sequential(made), {"0.weight": made}


@pytest.mark.parametrize("few", [True, False], ids=["keys", "fields"])
@pytest.mark.parametrize("storage", sparse_layers.STORAGES)
def test_an_exchanged_layer_has_the_statistics_of_its_masks(
    storage: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # small layers have a bit field by themselves
    monkeypatch.setattr(layer_history.ever_live, "_KEYS_UP_TO", 0 if few else 64)
    twin = nn.Sequential(nn.Linear(10, 12))
    model, layers = exchanged(storage, 0)
    mine, theirs = TopologyHistory(model), TopologyHistory(twin)
    for look, seed in enumerate([0, 1, 1, 2, 0]):
        mask = sparse_layers.mask_of(storage, seed=seed)
        layer = layers["0.weight"]
        units = mask[:: layer.group]
        layer.set_places(units.reshape(-1).nonzero().flatten())
        found = mine.look(look * 10, [weights_of(model, {}, layers)])
        assert torch.equal(layer.mask, mask)
        assert found == theirs.look(look * 10, [weights_of(twin, {"0.weight": mask})])
    assert (mine.state()["first/0.weight"].dtype == torch.int64) == few


def test_a_chain_of_exchanged_layers_has_the_paths_of_its_masks() -> None:
    masks = {
        f"{i}.weight": sparse_layers.mask_of("grouped", *shape, seed=i) for i, shape in enumerate([(8, 6), (12, 8)])
    }
    masks["2.weight"] = sparse_layers.mask_of("sparse", 5, 12, seed=2)
    dense = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 5))
    kinds = ["grouped", "grouped", "sparse"]
    layers = [
        SparseLinear.from_dense(dense[i], masks[f"{i}.weight"], storage=kind, group=4)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    ]
    model = nn.Sequential(*layers)
    held = weights_of(model, {}, {f"{i}.weight": layer for i, layer in enumerate(layers)})
    chains = [
        links_of(list(masks), [held], model),
        links_of(list(masks), [weights_of(dense, masks)], dense),
    ]
    mine, theirs = map(paths_of, chains)
    assert (mine.paths, mine.connections, mine.dead_units) == (theirs.paths, theirs.connections, theirs.dead_units)
    assert units(mine.off_path) == units(theirs.off_path)
    assert component_sizes(chains[0]) == component_sizes(chains[1])


# ---------------------------------------------------------------------- through a run


def test_a_history_that_is_saved_goes_on_as_it_would_have() -> None:
    model, source = chain_net(), torch.Generator().manual_seed(0)
    whole, begun = TopologyHistory(model), TopologyHistory(model)
    past = [drawn_masks(model, 0.4, source) for _ in range(5)]
    for look, masks in enumerate(past[:3]):
        for history in (whole, begun):
            history.look(look * 7, [weights_of(model, masks)])
    resumed = TopologyHistory(model)
    resumed.load({name: tensor.clone() for name, tensor in begun.state().items()})
    begun.look(100, [weights_of(model, past[0])])  # a state that was given away does not move
    for look, masks in enumerate(past[3:], 3):
        assert whole.look(look * 7, [weights_of(model, masks)]) == resumed.look(look * 7, [weights_of(model, masks)])


def test_a_layer_that_joins_has_nothing_to_be_compared_with_at_first() -> None:
    model, source = chain_net(), torch.Generator().manual_seed(0)
    first, second = drawn_masks(model, 0.4, source), drawn_masks(model, 0.4, source)
    history = TopologyHistory(model)

    def some(masks: Mapping[str, Tensor], names: Sequence[str]) -> SparseWeights:
        whole = weights_of(model, masks)
        return SparseWeights({n: whole.params[n] for n in names}, whole.entries, {n: masks[n] for n in names})

    history.look(0, [some(first, NAMES[:2])])
    figures, layers = history.look(10, [some(second, NAMES)])
    assert layers[NAMES[2]]["churn"] is None
    assert layers[NAMES[2]]["mean_age"] == 0
    both = sum(int((first[n] & second[n]).sum()) for n in NAMES[:2])
    there = sum(int(second[n].sum()) for n in NAMES[:2]) - both
    active = sum(int(m.sum()) for m in second.values())
    assert figures["topology/churn"] == pytest.approx(there / active)


def test_births_take_four_bytes_once_two_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_history, "LARGEST_INT16", 2)
    model, source = chain_net(), torch.Generator().manual_seed(0)
    history, past = TopologyHistory(model), []
    for look in range(6):
        past.append(drawn_masks(model, 0.5, source))
        figures, _ = history.look(look, [weights_of(model, past[-1])])
        assert figures["topology/mean_age"] == pytest.approx(slow_figures(past, range(look + 1))["topology/mean_age"])
        assert history.state()["births/0.weight"].dtype == (torch.int16 if look <= 2 else torch.int32)


def test_biases_under_a_mask_have_no_fans() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    entries = {n: Entry(n, p.numel(), tuple(p.shape), tuple(p.shape)) for n, p in model.named_parameters()}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    _, layers = TopologyHistory(model).look(0, [SparseWeights(dict(model.named_parameters()), entries, masks)])
    assert "fan_in" in layers["0.weight"]
    assert "fan_in" not in layers["0.bias"]


def test_a_layer_in_shards_is_left_out_with_the_reason() -> None:
    model = chain_net()
    masks = drawn_masks(model, 0.5, torch.Generator().manual_seed(0))
    weights = weights_of(model, masks)
    lie_as(weights.params["0.weight"], Shards(torch.Size([8, 3]), 0, 0, 4, None))  # type: ignore[arg-type]
    history = TopologyHistory(model)
    _, layers = history.look(0, [weights])
    assert list(layers) == NAMES[1:]
    assert "in shards" in history.left_out["0.weight"]


def test_the_memory_of_a_history_is_what_is_stated() -> None:
    model = nn.Sequential(nn.Linear(100, 80))
    mask = torch.zeros(80, 100, dtype=torch.bool)
    mask.view(-1)[:800] = True
    history = TopologyHistory(model)
    history.look(0, [weights_of(model, {"0.weight": mask})])
    history.look(1, [weights_of(model, {"0.weight": mask.roll(1, 0)})])
    held = {k: t for k, t in history.state().items() if k != "steps"}
    assert sum(t.numel() * t.element_size() for t in held.values()) == 8000 * (3 / 8 + 2 * 0.1)
