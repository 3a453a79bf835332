"""Partitions of layers, and the one owner of every tensor when workers are combined."""

import itertools
from typing import Any

import oracles.gap as oracle
import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.methods.gap.combination import combine, names_by_partition, tensor_owners
from sparse_callbacks.methods.gap.partitions import (
    balanced_parts,
    check_partitions,
    number_of,
    parts_between_cuts,
    split_layers,
)

SIZES = {"a.weight": 40, "b.weight": 10, "b.more": 5, "c.weight": 10, "d.weight": 40, "e.weight": 20}


def parts(partitions: Any, sizes: dict[str, int] = SIZES, seed: int = 0) -> list[list[str]]:
    return split_layers(partitions, sizes, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("cuts", "layers", "expected"), oracle.INDICES)
def test_cuts_begin_new_partitions(cuts: str, layers: int, expected: list[list[int]]) -> None:
    assert parts_between_cuts(cuts, layers) == expected
    names = {f"net.{i}.weight": 7 for i in range(layers)}
    assert parts(cuts, names) == [[f"net.{i}.weight" for i in part] for part in expected]
    assert number_of(cuts) == len(expected)


def best(sizes: list[int], count: int) -> list[int]:
    """By trying every way to cut."""
    ways = itertools.combinations(range(1, len(sizes)), count - 1)
    return min(
        sorted((sum(sizes[a:b]) for a, b in itertools.pairwise([0, *cut, len(sizes)])), reverse=True) for cut in ways
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_a_count_makes_the_largest_partition_as_small_as_possible(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(20):
        sizes = torch.randint(1, 30, (7,), generator=generator).tolist()
        found = balanced_parts(sizes, count)
        assert [i for part in found for i in part] == list(range(7))
        assert all(found)
        assert sorted((sum(sizes[i] for i in part) for part in found), reverse=True) == best(sizes, count)


def test_a_huge_layer_does_not_leave_the_others_unbalanced() -> None:
    assert balanced_parts([10, 10, 10, 10, 1000], 3) == [[0, 1], [2, 3], [4]]


def test_parameters_of_one_module_stay_together_in_model_order() -> None:
    assert parts(3) == [["a.weight", "b.weight", "b.more"], ["c.weight", "d.weight"], ["e.weight"]]
    assert parts("1-2") == [["a.weight"], ["b.weight", "b.more"], ["c.weight", "d.weight", "e.weight"]]


def test_random_partitions_derive_from_the_seed() -> None:
    drawn = [parts("random(3)", seed=s) for s in range(8)]
    assert drawn[3] == parts("random(3)", seed=3)
    assert len({str(d) for d in drawn}) > 4
    for found in drawn:
        assert sorted(n for part in found for n in part) == sorted(SIZES)
        assert all(found)
        assert len(found) == number_of("random(3)") == 3
        assert [n for n in SIZES if n in found[0]] == found[0]
        assert any({"b.weight", "b.more"} <= set(part) for part in found)
    assert any(parts("random(3)", seed=s) != parts(3) for s in range(8))


def test_globs_name_each_partition() -> None:
    assert parts(["[ab].*", ["c*", "d*"], "e*"]) == [
        ["a.weight", "b.weight", "b.more"],
        ["c.weight", "d.weight"],
        ["e.weight"],
    ]
    assert parts([["d*", "a*"], ["b.weight"], ["b.more", "c*", "e*"]])[0] == ["a.weight", "d.weight"]
    assert number_of(["a*", ["b*", "c*"]]) == 2
    assert check_partitions(("a*", ("b*", "c*"))) == [["a*"], ["b*", "c*"]]


@pytest.mark.parametrize(
    "wrong", [0, -1, True, 2.0, None, "", "2-", "conv*", "random(0)", "random", [], [[]], ["a", [""]], [3], {"a": 1}]
)
def test_what_makes_no_partitions_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="does not say which layers belong together"):
        check_partitions(wrong)


def test_partitions_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"asks for 6 partitions, and the sparse layers are only 5: a\.weight, b\.weight, b\.more"
    ):
        parts(6)
    with pytest.raises(ValueError, match=r"asks for 9 partitions, .* only 5"):
        parts("random(9)")
    with pytest.raises(ValueError, match=r"e\.weight are in no partition"):
        parts(["[ab]*", "[cd]*"])
    with pytest.raises(ValueError, match=r"b\.weight, b\.more are in several partitions"):
        parts(["[ab]*", "[bcde]*"])
    with pytest.raises(ValueError, match=r"conv\* match no sparse parameter"):
        parts(["*", "conv*"])


@pytest.mark.parametrize("cuts", ["0-2", "2-2", "3-2", "2-5", "1-9"])
def test_cuts_that_leave_a_partition_empty_are_refused(cuts: str) -> None:
    with pytest.raises(ValueError, match="Give rising numbers from 1 to 4"):
        parts_between_cuts(cuts, 5)


# ---------------------------------------------------------------------- owners


def tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.tensor(v) for k, v in values.items()}


def test_the_table_of_owners_and_its_combination() -> None:
    workers = [tensors(w) for w in oracle.WORKERS]
    owner = tensor_owners(workers[0], oracle.HELD)
    assert owner == oracle.OWNERS
    combined = combine(workers, owner)
    assert list(combined) == list(oracle.COMBINED)
    assert all(torch.equal(combined[k], torch.tensor(v)) for k, v in oracle.COMBINED.items())


def network() -> nn.Module:
    net = nn.Sequential(
        nn.BatchNorm1d(4),
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.LSTM(6, 3),
        nn.Linear(3, 2),
    )
    net.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    model = nn.Module()
    model.net = net
    model.register_buffer("steps", torch.zeros((), dtype=torch.long))
    return model


def test_what_has_no_mask_goes_with_the_last_masked_layer_before_it() -> None:
    state = network().state_dict()
    masked = [["net.1.weight"], ["net.4.weight"], ["net.6.weight_ih_l0", "net.6.weight_hh_l0", "net.7.weight"]]
    owner = tensor_owners(state, names_by_partition(state, masked))
    expected = {
        "steps": 0,
        "net.temperature": 0,
        "net.0": 0,
        "net.1": 0,
        "net.2": 0,
        "net.4": 1,
        "net.5": 1,
        "net.6": 2,
        "net.7": 2,
    }
    assert set(owner) == set(state)
    for key, index in owner.items():
        module = key if key in expected else key.rpartition(".")[0]
        assert index == expected[module], key


def test_random_partitions_take_their_norms_with_them() -> None:
    state = network().state_dict()
    masked = [["net.4.weight", "net.7.weight"], ["net.1.weight", "net.6.weight_ih_l0", "net.6.weight_hh_l0"]]
    owner = tensor_owners(state, names_by_partition(state, masked))
    assert [owner[k] for k in ("net.0.weight", "net.1.bias", "net.2.running_var", "net.4.bias", "net.5.weight")] == [
        0,
        1,
        1,
        0,
        0,
    ]
    assert {owner[k] for k in state if k.startswith("net.6.")} == {1}


def test_a_module_parted_by_globs_keeps_each_weight_with_its_partition() -> None:
    state = nn.ModuleDict({"rnn": nn.LSTM(3, 2), "norm": nn.LayerNorm(2)}).state_dict()
    owner = tensor_owners(state, names_by_partition(state, [["rnn.weight_hh_l0"], ["rnn.weight_ih_l0"]]))
    assert owner["rnn.weight_hh_l0"] == 0
    assert {owner[k] for k in state if k != "rnn.weight_hh_l0"} == {1}  # the first masked one in the model


def test_tied_weights_have_one_owner() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)}
    )
    model["embedding"].weight = model["head"].weight
    state = model.state_dict()
    owner = tensor_owners(state, names_by_partition(state, [["body.weight"], ["head.weight"]]))
    assert owner["embedding.weight"] == owner["head.weight"] == 1
    assert tensor_owners(state, [["embedding", "body"], ["head"]])["head.weight"] == 0  # by modules: the first


def test_a_name_held_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="body is held by partitions 0 and 1"):
        tensor_owners({"body.weight": torch.ones(1)}, [["body"], ["body"]])


def test_a_combination_shares_no_memory_with_the_workers() -> None:
    workers = [{"a": torch.ones(2), "extra": {"seen": [1]}}, {"a": torch.zeros(2), "extra": {"seen": [2]}}]
    combined = combine(workers, {"a": 0, "extra": 1})
    combined["a"] += 1
    combined["extra"]["seen"].append(3)
    assert workers[0]["a"].tolist() == [1, 1]
    assert workers[1]["extra"] == {"seen": [2]}


def test_workers_and_owners_must_have_the_same_keys() -> None:
    worker = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="worker 1 and owner= differ in b"):
        combine([worker, {"a": torch.ones(1)}], {"a": 0, "b": 1})
    with pytest.raises(ValueError, match="worker 0 and owner= differ in b"):
        combine([worker, worker], {"a": 0})
    with pytest.raises(ValueError, match="b have an owner outside the 2 workers"):
        combine([worker, worker], {"a": 0, "b": 2})
