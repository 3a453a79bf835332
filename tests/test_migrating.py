"""Pages for those who come from another library: the old code and ours, run side by side, do what the page says."""

import contextlib
import copy
import inspect
import math
import re
import tomllib
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from packaging.requirements import Requirement
from pytorch_lightning.callbacks import ModelPruning
from rigl_torch.RigL import RigLScheduler
from rigl_torch.util import get_W
from support import documents
from support.documents import ROOT, Block, blocks, run_example
from torch import Tensor, nn
from torch.nn.utils import prune

import sparse_callbacks
from sparse_callbacks import PruneAtStart, sparsify
from sparse_callbacks.methods import NM, RigL, Static

FOLDER = ROOT / "docs/migrating"
GUIDES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    documents.shorten_trainers(monkeypatch)


def under(page: str, heading: str) -> dict[str, Block]:
    """The blocks with a title under a heading, by title."""
    path = FOLDER / f"{page}.md"
    lines = path.read_text().splitlines()
    begin = lines.index(f"## {heading}")
    end = next((i for i, line in enumerate(lines) if i > begin and line.startswith("## ")), len(lines))
    return {b.options["title"]: b for b in blocks(path) if "title" in b.options and begin < b.line <= end}


def both(page: str, heading: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the old code and ours, each on the same network and data; gives the names that each has left."""
    found = under(page, heading)
    before, after = (run_example(found[title].text, str(found[title])) for title in ("before", "after"))
    return before, after


def nonzeros(module: nn.Module) -> dict[str, Tensor]:
    """The non-zeros of every convolution and matrix, by the name of its weight."""
    found = {f"{n}.weight": m.weight != 0 for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert found
    return found


def assert_same_masks(old: Mapping[str, Tensor], ours: Mapping[str, Tensor], rounding: int) -> None:
    """Masks are equal but for ``rounding`` weights in all, which floor() keeps and round() does not."""
    assert old.keys() == ours.keys()
    assert not any((old[n] & ~ours[n]).any() for n in old), "ours has pruned what the old one has kept"
    assert sum(int((ours[n] & ~old[n]).sum()) for n in old) == rounding


def difference(amount: float, sizes: list[int]) -> int:
    return sum(round(amount * size) - math.floor(amount * size) for size in sizes)


def sizes_of(module: nn.Module) -> list[int]:
    return [mask.numel() for mask in nonzeros(module).values()]


# ---------------------------------------------------------------------- all pages


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.stem)
def test_a_guide_shows_both_sides_and_says_what_differs(page: Path) -> None:
    text = page.read_text()
    titles = [block.options.get("title") for block in blocks(page)]
    assert titles.count("before") == titles.count("after") >= 1
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert {"What to replace by what", "What behaves differently", "What is not here"} <= {*headings}
    assert re.search(r"\b\d+\.\d+", text.split("##")[0]), "the version that it speaks of stands above the first heading"


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.stem)
def test_the_index_leads_to_every_guide(page: Path) -> None:
    assert f"]({page.name})" in (FOLDER / "index.md").read_text()


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.stem)
def test_what_stands_on_our_side_of_a_table_exists(page: Path) -> None:
    """Arguments in the last column are those of some method, or of a function of ours."""
    known = {"callbacks", *sparse_callbacks.Options.__annotations__}
    for name in sparse_callbacks.__all__:
        with contextlib.suppress(TypeError, ValueError):  # a module, or a class without a signature of its own
            known |= set(inspect.signature(getattr(sparse_callbacks, name)).parameters)
    rows = re.findall(r"^\| .* \|$", page.read_text(), re.M)
    for row in rows:
        ours = row.rstrip("| ").rpartition(" | ")[2]
        for code in re.findall(r"`([^`]+)`", ours):
            assert set(re.findall(r"(\w+)=", code)) <= known, row
            for name in re.findall(r"\b([A-Z]\w+)\(", code):
                assert hasattr(sparse_callbacks, name), row


# ---------------------------------------------------------------------- torch.nn.utils.prune


def test_one_threshold_of_torch_is_that_of_prune_at_start() -> None:
    before, after = both("torch_prune", "Prune once, then train on")
    old, ours = nonzeros(before["model"]), after["run"].masks
    assert_same_masks(
        old,
        ours,
        rounding=round(0.8 * sum(sizes_of(before["model"]))) - math.floor(0.8 * sum(sizes_of(before["model"]))),
    )
    if all(torch.equal(old[n], ours[n]) for n in old):  # then the whole training is the same
        states = before["model"].state_dict(), after["model"].state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.allclose(states[0][k], states[1][k], atol=1e-6) for k in states[0])
    assert 0.79 < after["run"].measured_sparsity()["sparsity/total"] <= 0.8


def test_a_share_of_each_layer_is_the_uniform_distribution() -> None:
    before, after = both("torch_prune", "Prune each layer by the same share")
    old = {
        name.removesuffix("_mask"): mask.bool()
        for name, mask in before["model"].named_buffers()
        if name.endswith("_mask")
    }
    assert_same_masks(old, after["run"].masks, difference(0.8, sizes_of(before["model"])))


def test_calls_of_torch_compound_and_ours_arrives_at_the_same_sparsity() -> None:
    before, after = both("torch_prune", "Prune a little more from time to time")
    masks = [mask for name, mask in before["model"].named_buffers() if name.endswith("_mask")]
    size = sum(mask.numel() for mask in masks)
    assert sum(int((mask == 0).sum()) for mask in masks) == pytest.approx(0.875 * size, abs=3)
    assert after["run"].measured_sparsity()["sparsity/total"] == pytest.approx(math.floor(0.875 * size) / size)


def test_masks_that_torch_is_given_are_given_here_by_name() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    masks = {name: torch.rand_like(p) < 0.5 for name, p in net.named_parameters() if p.ndim == 2}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with sparsify(Static(initial_mask=masks, include=list(masks), print_plan=False), net, optimizer, steps=1) as run:
        for i in (0, 1):
            prune.custom_from_mask(layer := nn.Linear(*reversed(net[i].weight.shape)), "weight", masks[f"{i}.weight"])
            assert torch.equal(run.masks[f"{i}.weight"], layer.weight_mask.bool())


def test_momentum_moves_what_torch_hides_and_not_what_is_pruned_here() -> None:
    """ "What behaves differently": pruned weights in `weight_orig` go on."""

    def trained(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            net(torch.ones(2, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def sgd(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6))
    optimizer = sgd(net)
    trained(net, optimizer)
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    pruned, was = net[0].weight_mask == 0, net[0].weight_orig.detach().clone()
    trained(net, optimizer)
    assert (net[0].weight_orig[pruned] != was[pruned]).all()
    prune.remove(net[0], "weight")
    assert [name for name, _ in net.named_parameters()] == ["0.bias", "0.weight"]
    optimizer = sgd(net)
    with sparsify(Static(initial_mask="nonzero", print_plan=False), net, optimizer, steps=3):
        trained(net, optimizer)
        assert (net[0].weight[pruned] == 0).all()
        assert (net[0].weight[~pruned] != 0).all()


# ---------------------------------------------------------------------- ModelPruning


def test_a_pruning_at_the_end_of_an_epoch_is_prune_at_start_with_a_time() -> None:
    before, after = both("model_pruning", "Prune once")
    old, ours = nonzeros(before["your_module"]), after["pruning"].masks
    size = sum(mask.numel() for mask in ours.values())
    assert_same_masks(old, ours, round(0.8 * size) - math.floor(0.8 * size))


def test_epochs_of_model_pruning_compound_and_ours_arrives_at_the_same_sparsity() -> None:
    before, after = both("model_pruning", "In the Trainer")
    old = nonzeros(before["your_module"])
    size = sum(mask.numel() for mask in old.values())
    assert sum(int((~mask).sum()) for mask in old.values()) == pytest.approx(0.875 * size, abs=3)
    assert after["pruning"].measured_sparsity()["sparsity/total"] == pytest.approx(math.floor(0.875 * size) / size)


def test_masks_of_model_pruning_are_lost_on_resume(capsys: pytest.CaptureFixture[str]) -> None:
    """The script of the page, and that it would show it if they were not lost."""
    block = under("model_pruning", "Its masks are lost on resume")["resume"]
    names = run_example(block.text, str(block))
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[-2:] == ["zeros after the first epoch: 0.8", "zeros after the second epoch are fewer than 0.1: True"]
    saved = torch.load("pruned.ckpt", weights_only=False)
    assert not any("mask" in key for key in saved["state_dict"])
    assert not saved["callbacks"]
    assert names["zeros"](names["pruned"]) == pytest.approx(0.8, abs=0.01)
    assert names["zeros"](names["resumed"]) < 0.1


def test_a_checkpoint_with_the_masks_of_model_pruning_cannot_be_resumed() -> None:
    names = documents.names_for("")
    module, data = names["your_module"], names["your_data"]

    def trainer(epochs: int) -> pl.Trainer:
        pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.8, make_pruning_permanent=False)
        return pl.Trainer(max_epochs=epochs, callbacks=[pruning])

    first = trainer(1)
    first.fit(module, data)
    first.save_checkpoint("masks.ckpt")
    assert any(key.endswith("weight_mask") for key in torch.load("masks.ckpt", weights_only=False)["state_dict"])
    fresh = documents.names_for("")["your_module"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key\(s\) in state_dict: .*Unexpected key\(s\)"):
        trainer(2).fit(fresh, data, ckpt_path="masks.ckpt")
    # and yet it gives its masks here
    method = Static(initial_mask="masks.ckpt", print_plan=False)
    with sparsify(method, fresh, torch.optim.SGD(fresh.parameters(), lr=0.1), steps=1) as run:
        assert all(torch.equal(mask, module.get_buffer(f"{name}_mask").bool()) for name, mask in run.masks.items())


def test_model_pruning_prunes_biases_and_gains_of_norms_by_default() -> None:
    names = documents.names_for("")
    module = names["your_module"]
    pl.Trainer(callbacks=[ModelPruning("l1_unstructured", amount=0.8)]).fit(module, names["your_data"])
    assert any((p == 0).any() for n, p in module.named_parameters() if n.endswith("bias"))
    ours = documents.names_for("")["your_module"]
    pl.Trainer(callbacks=[PruneAtStart(0.8, score="magnitude")]).fit(ours, names["your_data"])
    assert not any((p == 0).any() for n, p in ours.named_parameters() if p.ndim == 1)


# ---------------------------------------------------------------------- rigl-torch


def test_the_page_is_about_the_version_that_the_tests_have() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = (r for r in map(Requirement, extras["dev"]) if r.name == "rigl-torch")
    assert str(pinned.specifier).removeprefix("==") in (FOLDER / "rigl_torch.md").read_text()


def test_both_move_masks_in_the_same_batches_and_keep_the_same_number_of_weights() -> None:
    before, after = both("rigl_torch", "In your loop")
    pruner, run = before["pruner"], after["run"]
    assert run.updates == pruner.rigl_steps
    names = {id(p): name for name, p in before["model"].named_parameters()}
    old = {names[id(w)]: m for w, m in zip(get_W(before["model"]), pruner.backward_masks, strict=True) if m is not None}
    assert {n: int(m.sum()) for n, m in old.items()} == {n: int(m.sum()) for n, m in run.masks.items()}


def test_an_update_of_rigl_torch_is_ours() -> None:
    """From the same masks and gradients, in the same batch, the same connections."""
    steps, delta, last = 8, 4, 8

    def network() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5))

    old, ours = network(), network()
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1, momentum=0.9)
    pruner = RigLScheduler(old, optimizer, dense_allocation=0.3, T_end=last, delta=delta, ignore_linear_layers=False)
    names = {id(p): name for name, p in old.named_parameters()}
    masks = {names[id(w)]: m.clone() for w, m in zip(get_W(old), pruner.backward_masks, strict=True) if m is not None}
    ours.load_state_dict(old.state_dict())
    # rigl-torch counts batches for its cosine: the first update falls at batch `delta`
    fraction = 0.3 / 2 * (1 + math.cos(delta * math.pi / last))
    method = RigL(
        initial_mask=masks,
        include=list(masks),
        every=delta - 1,
        start=delta - 1,
        stop=2 * (delta - 1),
        drop_fraction=f"constant({fraction})",
        print_plan=False,
    )
    second = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    run = sparsify(method, ours, second, steps=steps)
    x = torch.randn(16, 12)
    for batch in range(1, 8):
        for net in (old, ours):
            net(x).square().mean().backward()
        if pruner():
            optimizer.step()
        optimizer.zero_grad()
        second.step()
        second.zero_grad()
        assert pruner.rigl_steps == run.updates == (batch >= delta), batch
        now = {names[id(w)]: m for w, m in zip(get_W(old), pruner.backward_masks, strict=True) if m is not None}
        assert all(torch.equal(now[name], mask) for name, mask in run.masks.items()), batch
        states = old.state_dict(), ours.state_dict()
        assert all(torch.allclose(states[0][k], states[1][k], atol=1e-6) for k in states[0]), batch
    assert any(not torch.equal(now[name], masks[name]) for name in masks), "no connection has moved"
    run.close()


def test_the_step_of_rigl_torch_takes_neither_a_closure_nor_a_schedule() -> None:
    net = nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    RigLScheduler(net, optimizer, dense_allocation=0.3, T_end=9, delta=4, ignore_linear_layers=False)
    with pytest.raises(TypeError):
        optimizer.step(lambda: None)
    with pytest.raises(AttributeError):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_rigl_torch_without_an_end_fails_at_the_first_backward_pass() -> None:
    net = nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 5))
    RigLScheduler(net, torch.optim.SGD(net.parameters(), lr=0.1), dense_allocation=0.3, ignore_linear_layers=False)
    with pytest.raises(TypeError):
        net(torch.ones(2, 12)).sum().backward()


def test_rigl_torch_masks_gains_and_keeps_the_moments_of_adam() -> None:
    net = nn.Sequential(nn.Linear(12, 30), nn.LayerNorm(30), nn.Linear(30, 5))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    pruner = RigLScheduler(net, optimizer, dense_allocation=0.3, T_end=9, delta=2, ignore_linear_layers=False)
    assert (net[1].weight == 0).sum() == int(0.7 * 30)
    was = pruner.backward_masks[2].clone()
    for _ in range(2):
        net(torch.randn(4, 12)).square().mean().backward()
        if pruner():
            optimizer.step()
    gone = was & ~pruner.backward_masks[2]
    assert gone.any()
    assert (optimizer.state[net[2].weight]["exp_avg_sq"][gone] > 0).any()


# ---------------------------------------------------------------------- N:M, as torchao and torch.ao.pruning prune


def test_two_of_four_of_torch_is_ours() -> None:
    before, after = both("torchao", "2:4 weights by magnitude")
    old, ours = nonzeros(before["model"]), after["run"].masks
    assert all(
        torch.equal(old[name], mask) for name, mask in ours.items() if before["model"].get_parameter(name).ndim == 2
    )
    assert any(before["model"].get_parameter(name).ndim == 2 for name in ours)


def test_the_rule_of_asp_is_ours() -> None:
    """NVIDIA's ASP keeps, of each four inputs, the two whose magnitudes have the largest sum (`m4n2_1d`)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8, bias=False))
    magnitudes = net[0].weight.detach().abs().reshape(-1, 4)
    pairs = torch.tensor([[float(i in pair) for i in range(4)] for pair in combinations(range(4), 2)])
    best = pairs[(magnitudes @ pairs.T).argmax(1)].bool().reshape(8, 16)
    for method in (NM("2:4", print_plan=False), Static(pattern="2:4", initial_mask="magnitude", print_plan=False)):
        with sparsify(method, net, torch.optim.SGD(net.parameters(), lr=0.0), steps=1) as run:
            assert torch.equal(run.masks["0.weight"], best)


def test_fake_sparsity_of_torchao_is_two_of_four() -> None:
    api = pytest.importorskip(
        "torchao.sparsity.sparse_api", reason="torchao is not installed, or has no sparsity any more"
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    ours = copy.deepcopy(net)
    api.apply_fake_sparsity(net)
    method = Static(pattern="2:4", initial_mask="magnitude", print_plan=False)
    with sparsify(method, ours, torch.optim.SGD(ours.parameters(), lr=0.1), steps=1) as run:
        assert all(torch.equal(run.masks[name], mask) for name, mask in nonzeros(net).items())
