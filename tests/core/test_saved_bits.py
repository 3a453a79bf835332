"""Masks are saved as bits, are read from files of every version, and are refused where they are damaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.ends import FOLDER, unpack
from support import loops

from sparse_callbacks import saved_masks, sparsify
from sparse_callbacks.core.saved_bits import as_bits, count_of_false, truths_of, why_not_bits, with_truths
from sparse_callbacks.methods import GMP, RigL, Static

pytestmark = pytest.mark.filterwarnings("ignore:.*ended in the middle of its updates")


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (3, 5), (2, 3, 4, 1)])
def test_truth_values_come_back_from_bits(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    truths = torch.rand(shape) < 0.5
    kept = as_bits(truths)
    assert kept["bits"].numel() == -(-truths.numel() // 8)
    assert why_not_bits(kept) == ""
    assert torch.equal(truths_of(kept), truths)
    assert count_of_false(kept) == count_of_false(truths) == int((~truths).sum())


def test_bits_are_in_the_order_of_elements_whatever_the_layout_in_memory() -> None:
    mask = torch.zeros(2, 3, 2, 2, dtype=torch.bool).to(memory_format=torch.channels_last)
    mask[0, 1, 0, 0] = mask[1, 2, 1, 1] = True  # elements 4 and 23
    assert as_bits(mask)["bits"].tolist() == [16, 0, 128]
    whole_filters = torch.tensor([[True], [False]]).expand(2, 8)
    assert as_bits(whole_filters)["bits"].tolist() == [255, 0]


def state_of(method: Any, steps: int = 5) -> dict[str, Any]:
    """The state of a run after some steps, and beside it the masks."""
    model = loops.net()
    optimizer = loops.sgd(model)
    run = loops.begin(method, model, optimizer)
    loops.train(run, model, optimizer, last=steps, check=False)
    found = {
        "run": run.state_dict(),
        "model": model.state_dict(),
        "masks": {n: m.clone() for n, m in run.masks.items()},
    }
    run.close()
    return found


def test_a_state_takes_one_bit_for_each_truth_value(tmp_path: Path) -> None:
    found = state_of(RigL(0.8, every=2, print_plan=False))
    state = found["run"]
    assert state["version"] == 2
    assert any(key.startswith("ever_active/") for key in state["aux"])
    for name, mask in found["masks"].items():
        for kept in (state["masks"][name], state["aux"][f"ever_active/{name}"]):
            assert kept["bits"].dtype == torch.uint8
            assert kept["bits"].untyped_storage().nbytes() == -(-mask.numel() // 8)
            assert kept["shape"] == [*mask.shape]
    torch.save(state, tmp_path / "state.pt")
    assert saved_masks(torch.load(tmp_path / "state.pt", weights_only=True)).keys() == found["masks"].keys()


def test_masks_are_read_from_files_of_this_and_of_the_first_version(tmp_path: Path) -> None:
    found = state_of(GMP(0.8, every=1, stop=4, print_plan=False))
    torch.save({"model": found["model"], "run": found["run"]}, tmp_path / "run.pt")
    for source in (tmp_path / "run.pt", str(tmp_path / "run.pt"), found["run"], {"callbacks": {"GMP{}": found["run"]}}):
        read = saved_masks(source)
        assert read.keys() == found["masks"].keys()
        assert all(torch.equal(mask, found["masks"][name]) for name, mask in read.items())
    first = unpack(FOLDER / "set.ckpt.gz", tmp_path)
    (state,) = torch.load(first, weights_only=True)["callbacks"].values()
    assert state["version"] == 1
    assert all(torch.equal(mask, state["masks"][name]) for name, mask in saved_masks(first).items())


def test_masks_of_sparse_storage_are_made_of_the_places(tmp_path: Path) -> None:
    found = state_of(RigL(0.8, every=2, print_plan=False, storage="sparse"))
    torch.save({"model": found["model"], "run": found["run"]}, tmp_path / "run.pt")
    read = saved_masks(tmp_path / "run.pt")
    assert all(torch.equal(read[name], mask) for name, mask in found["masks"].items())
    with pytest.raises(ValueError, match=r"has sparse storage, and not the weight.*Give the whole checkpoint"):
        saved_masks(found["run"])


def test_a_state_whose_truth_values_are_bytes_goes_on_as_one_of_bits_does() -> None:
    found = state_of(RigL(0.8, every=2, print_plan=False))
    ends = []
    for state in (found["run"], {**with_truths(found["run"]), "version": 1}):
        model = loops.net()
        model.load_state_dict(found["model"])
        optimizer = loops.sgd(model)
        run = loops.begin(RigL(0.8, every=2, print_plan=False), model, optimizer, state=state)
        loops.train(run, model, optimizer, 5, 9, check=False)
        ends.append([*model.state_dict().values(), *run.masks.values(), *with_truths(run.state_dict())["aux"].values()])
        run.close()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


DAMAGED = {
    "a byte less": ({"bits": torch.zeros(2, dtype=torch.uint8), "shape": [3, 8]}, "24 truth values have 3 bytes"),
    "another type": ({"bits": torch.zeros(3), "shape": [3, 8]}, "not a tensor of bytes"),
    "no sizes": ({"bits": torch.zeros(3, dtype=torch.uint8), "shape": [3, -8]}, "not a list of whole numbers"),
    "bits beyond": (
        {"bits": torch.tensor([255], dtype=torch.uint8), "shape": [5]},
        "has bits beyond its 5 truth values",
    ),
    "a huge shape": (
        {"bits": torch.zeros(1, dtype=torch.uint8).expand(2**30), "shape": [2**33]},
        "and 8589934592 truth values have 1073741824 bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("part", ["masks", "aux", "averages"])
def test_damaged_bits_are_refused_before_memory_is_taken_for_them(damage: str, part: str) -> None:
    value, why = DAMAGED[damage]
    found = state_of(RigL(0.8, every=2, print_plan=False))
    state = found["run"]
    if part == "averages":
        state["averages"] = {"0": {"born": {"0.weight": value}}}
    else:
        state[part] = {**state[part], next(iter(state[part])): value}
    with pytest.raises(ValueError, match=rf"cannot be resumed from: .*{part}.*{why}.*Resume from another checkpoint"):
        loops.begin(RigL(0.8, every=2, print_plan=False), loops.net(), loops.sgd(loops.net()), state=state)
    if part == "masks":
        with pytest.raises(ValueError, match=rf"is damaged: the mask of .*{why}"):
            saved_masks(state)
        source = {"model": found["model"], "run": state}
        with pytest.raises(ValueError, match=rf"the mask of .*{why}"):
            Static(initial_mask=source, print_plan=False).plan(loops.net())


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (
            "missing.ckpt",
            r"'missing\.ckpt' is not a file, so no masks can be read from it\. Give a checkpoint of a run of this package",
        ),
        ({"a": torch.ones(1)}, r"source, the mapping, holds no masks of this package"),
        ({"callbacks": {"GMP{}": {"masks": 3}}}, r"is damaged: masks in it are 3"),
        ({"callbacks": {"GMP{}": {"masks": {"a": 3}}}}, r"is damaged: the mask of a is 3"),
        (
            {"callbacks": {"SET{}": {"masks": {}, "patterns": {"a": {"idx": 3}}}}},
            r"the live weights of a is not a pattern",
        ),
        (
            {
                "a": torch.ones(2, 2),
                "callbacks": {
                    "SET{}": {
                        "masks": {},
                        "patterns": {"a": {"crow": torch.tensor([0, 1, 9]), "col": torch.tensor([0, 1])}},
                    }
                },
            },
            r"is damaged: of the live weights of a, ",
        ),
    ],
)
def test_what_holds_no_masks_is_refused(source: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        saved_masks(source)


def test_a_network_that_is_only_looked_at_has_no_integers_to_mask_with() -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    method = RigL(0.8, every=2, print_plan=False)
    with sparsify(method, model, optimizer, steps=8) as run:
        loops.train(run, model, optimizer, last=3)
        held = sum(t.numel() * t.element_size() for t in method.weights.mask_tensors())
    left = sum(t.numel() * t.element_size() for t in method.weights.mask_tensors())
    size = sum(mask.numel() for mask in run.masks.values())
    assert (held, left) == (5 * size, size)  # float32: four bytes a weight within the run, and one after it
