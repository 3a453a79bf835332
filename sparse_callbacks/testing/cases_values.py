"""The contract for weights and masks: effective after every batch, exact counts, gradients, updates."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_callbacks.testing.comparison import assert_counts, assert_effective, per_element_state, sparse_weights
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import OPTIMIZERS, Classifier
from sparse_callbacks.testing.runs import fit, watch
from sparse_callbacks.testing.subject import STEPS, Contract, aux_of, needs

# ---------------------------------------------------------------------- effective weights


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_effective_after_every_batch(self: Contract, optimizer: str) -> None:
    """After every batch each sparse weight is what its mask leaves of it."""
    callback, module = self.method(), Classifier(optimizer=optimizer)
    before = copy.deepcopy(module.state_dict())
    seen: list[int] = []

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, callback)
        seen.append(index)

    at_start = pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: assert_effective(module, callback))
    fit(module, callback, at_start, watch(check))
    assert seen == list(range(STEPS))
    for key, (weight, mask) in sparse_weights(module, callback).items():
        assert not torch.equal(weight[mask], before[key][mask]), f"{key} never moved"
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert (callback.updates > 2) == self.moves()


@needs("one network", "planned counts")
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_equals_a_hand_written_loop(self: Contract, optimizer: str, clip: float | None) -> None:
    """Given the masks after each batch, a plain loop (mask gradients, clip, step, mask weights) has the same weights,
    bit by bit.

    With a dense copy: gradients are not masked, and the dense weights take the step.
    """
    callback, module = self.method(restart=False), Classifier(optimizer=optimizer)
    by_hand = copy.deepcopy(module)
    masks: list[dict[str, Tensor]] = []
    aux: list[dict[str, Tensor]] = []
    steps = [0]
    weights_after: list[dict[str, Tensor]] = []

    def record(trainer: pl.Trainer, *_: Any) -> None:
        masks.append({n: m.clone() for n, m in callback.masks.items()})
        aux.append(copy.deepcopy(callback.aux))
        weights_after.append({n: module.get_parameter(n).detach().clone() for n in callback.masks})
        steps.append(callback.step)

    def start(*_: Any) -> None:
        masks.append(callback.masks)
        aux.append(copy.deepcopy(callback.aux))

    started = pl.callbacks.LambdaCallback(on_train_start=start)
    trainer = fit(module, callback, started, watch(record), gradient_clip_val=clip)
    configured = by_hand.configure_optimizers()
    plain, rates = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    weights = dict(by_hand.named_parameters())
    dense = {key: weights[key].detach().clone() for key in masks[0]} if not self.promises("pruned weights rest") else {}
    with torch.no_grad():
        for key, mask in masks[0].items():
            weights[key].mul_(mask)
    for index, batch in enumerate(Batches().all(2)):
        plain.zero_grad()
        torch.autograd.backward(by_hand.loss(batch))
        if steps[index + 1] > steps[index]:  # otherwise an update took this step's place
            for key, mask in masks[index].items():
                gradient = weights[key].grad
                assert gradient is not None
                gradient.copy_(self.gradient(mask, gradient, aux_of(aux[index], key)))
                weights[key].data.copy_(dense.get(key, weights[key]))
            if clip is not None:
                nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
            plain.step()
        for key, value in dense.items():
            value.copy_(weights[key].detach())
            weights[key].data.mul_(masks[index + 1][key])
        with torch.no_grad():
            for key, mask in {} if dense else masks[index].items():
                for value in per_element_state(plain, weights[key]).values():
                    value.masked_fill_(masks[index + 1][key] & ~mask, 0)
                weights[key].mul_(mask & masks[index + 1][key])
                if not self.promises("grown weights start from zero"):
                    born = masks[index + 1][key] & ~mask
                    weights[key][born] = weights_after[index][key][born]
        rates.step()
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), by_hand.state_dict().values(), strict=True)
    )
    theirs = dict(module.named_parameters())
    for key, mask in masks[-1].items():
        mine = per_element_state(plain, weights[key])
        for kind, value in per_element_state(trainer.optimizers[0], theirs[key]).items():
            assert torch.equal(value[mask], mine[kind][mask]), (key, kind)


@needs("one network", "planned counts")
def test_gradients_are_masked_before_they_are_clipped(self: Contract) -> None:
    """At the clip gradients are as the settings say."""

    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *values: Any, **named: Any) -> None:
            for key, (_, mask) in sparse_weights(self, callback).items():
                gradient = self.get_parameter(key).grad
                if gradient is not None and not mask.all():
                    contract.assert_gradient(callback, key, gradient)
                seen.append(gradient)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    seen: list[Tensor | None] = []
    contract, callback = self, self.method()
    fit(Clips(), callback)
    assert not all(bool(m.all()) for m in callback.masks.values())
    assert sum(g is not None for g in seen) >= 2 * len(seen) // 3


# ---------------------------------------------------------------------- counts


DISTRIBUTIONS = [
    "uniform",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "uniform_plus",
    "lamp",
    {"rnn.*": 0.37, "*.fc?.weight": "erdos_renyi", "*": "uniform"},
]


@needs("one network", "planned counts", "any share")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("keep_dense", [None, "first"])
def test_counts_are_exactly_the_planned_ones(self: Contract, distribution: Any, keep_dense: str | None) -> None:
    """There are exactly as many zeros as plan() announces."""

    class Mixed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleDict(
                {"fc1": nn.Linear(25, 12), "fc2": nn.Linear(12, 4), "up": nn.ConvTranspose2d(2, 3, 3)}
            )
            self.attention, self.rnn = nn.MultiheadAttention(12, 2, batch_first=True), nn.GRU(12, 12, batch_first=True)

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def forward(self, images: Tensor) -> Any:
            x = torch.relu(self.parts["up"](images))[:, :, 1:6, 1:6].flatten(2)
            x, _ = self.rnn(torch.relu(self.parts["fc1"](x)))
            x, _ = self.attention(x, x, x, need_weights=False)
            return self.parts["fc2"](x.mean(1)) + self.net(images)

    others = {}
    if not self.promises("any layer"):  # those of attention and recurrent layers are not known
        others = {"exclude": ["attention.*", "rnn.*", "parts.*"]}
        distribution = {"*": distribution["*"]} if isinstance(distribution, dict) else distribution
    callback, module = self.method(distribution=distribution, keep_dense=keep_dense, sparsity=0.77, **others), Mixed()
    announced = callback.plan(module)
    reached: list[int] = []

    def check(trainer: pl.Trainer, module: Mixed, index: int) -> None:
        if callback.at_target:
            assert_counts(callback)
            reached.append(index)

    fit(module, callback, watch(check))
    assert callback.at_target
    assert reached
    assert callback.plan() == announced
    measured = callback.measured_sparsity()
    zeros = sum(int((~m).sum()) for m in callback.masks.values())
    assert measured["sparsity/total"] == pytest.approx(
        zeros / sum(m.numel() for m in callback.masks.values()), abs=1e-12
    )
    assert measured["sparsity/total"] == pytest.approx(announced.total, abs=1e-12)
    assert measured["sparsity/model"] == pytest.approx(zeros / sum(p.numel() for p in module.parameters()), abs=1e-12)
    assert measured["sparsity/model"] == pytest.approx(announced.model, abs=1e-12)
    selected = [row for row in announced if row.name in announced.selected]
    assert {r.name for r in selected} == set(callback.masks)
    assert {k for k in measured if k not in ("sparsity/total", "sparsity/model")} == {
        f"sparsity/{r.name}" for r in selected
    }
    for row in selected:
        if announced.joint is None:
            assert measured[f"sparsity/{row.name}"] == pytest.approx(row.zeros / row.size, abs=1e-12)
        assert row.shape == tuple(module.get_parameter(row.name).shape)
    if distribution == "uniform" and announced.joint is None:
        parts = {"attention.in_proj_weight": 3, "rnn.weight_ih_l0": 3, "rnn.weight_hh_l0": 3}
        assert all(r.zeros == parts.get(r.name, 1) * int(0.77 * (r.size // parts.get(r.name, 1))) for r in selected)
    assert ("net.0.weight" in callback.masks) == (keep_dense is None)


# ---------------------------------------------------------------------- updates


@needs("one network", "planned counts")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_move_masks_and_nothing_else(self: Contract, optimizer: str) -> None:
    """Grown weights start from nothing; a step that an update replaces moves no weight, no momentum and no counter."""
    callback, module = self.method(restart=False), Classifier(optimizer=optimizer)
    last: dict[str, Any] = {}
    grown, regrown, replaced = [0], [0], [0]
    copied = not self.promises("pruned weights rest")

    def keep(trainer: pl.Trainer, module: Classifier, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        last.update(
            copy.deepcopy(
                {
                    "weights": {n: p.detach() for n, p in module.named_parameters()},
                    "state": {n: dict(optimizer.state[p]) for n, p in module.named_parameters()},
                    "masks": callback.masks,
                    "counts": (callback.step, callback.updates, trainer.global_step, optimizer.param_groups[0]["lr"]),
                }
            )
        )

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        optimizer, before = trainer.optimizers[0], dict(last)
        for key, (weight, mask) in sparse_weights(module, callback).items():
            born = mask & ~before["masks"][key]
            grown[0] += int(born.sum())
            if copied:
                assert torch.equal(weight[born], callback.weights.dense_values(key)[born])
                assert weight[born].all()
            elif not self.promises("grown weights start from zero"):
                assert weight[born].all()
            else:
                assert not weight[born].any()
            parameter = module.get_parameter(key)
            for kind, value in per_element_state(optimizer, parameter).items():
                assert bool(value[born].any()) == (copied and bool(born.any())), (
                    f"{key}: {kind} of grown weights is not zero"
                )
                if index:
                    stayed = mask & before["masks"][key]
                    assert value[stayed].any(), f"{key}: {kind} of old weights is lost"
        keep(trainer, module)
        step, updates, global_step, rate = before["counts"]
        assert global_step + 1 == trainer.global_step
        assert optimizer.param_groups[0]["lr"] < rate
        if callback.step > step:
            assert callback.step == step + 1
            return
        replaced[0] += 1
        assert callback.updates == updates + 1
        for key in last["weights"]:
            mask = callback.masks.get(key, torch.ones_like(last["weights"][key], dtype=torch.bool))
            stays = mask & before["masks"].get(key, mask)
            assert torch.equal(last["weights"][key][stays], before["weights"][key][stays]), f"{key} moved in an update"
            assert set(last["state"][key]) == set(before["state"][key])
            for kind, value in before["state"][key].items():
                now = last["state"][key][kind]
                alike = torch.equal(now, value) if now.shape != mask.shape else torch.equal(now[stays], value[stays])
                assert alike, f"{kind} of {key} moved in an update"
            if key in callback.masks:
                old = before["masks"][key]
                size = before["weights"][key].abs()
                if (
                    left := size[old & ~mask]
                ).numel():  # a smaller one that is there was dropped as well, and grown again
                    regrown[0] += int((size[old & mask] < left.max()).sum())

    begin = pl.callbacks.LambdaCallback(on_train_start=keep)
    fit(module, callback, begin, watch(check))
    assert bool(grown[0]) == (self.promises("growth") or copied)
    if replaced[0]:
        assert min(grown[0], regrown[0]) > 0
    assert replaced[0] in (0, callback.updates)
