"""Static: one mask from the first step to the last, drawn at random or taken from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from support.data import loader
from support.nets import Regression, mlp
from support.rig import copied_masks, fit_steps
from torch import Tensor

from sparse_callbacks import GMP, RigL, Static
from sparse_callbacks.testing.runs import trainer_for

NAMES = ["net.0.weight", "net.2.weight"]


def masks_over(path: Path, callback: Static, module: Regression, steps: int = 8) -> list[dict[str, Tensor]]:
    seen: list[dict[str, Tensor]] = []
    watch = Callback()
    watch.on_train_batch_start = lambda *_: seen.append(copied_masks(callback))
    watch.on_train_batch_end = lambda *_: seen.append(copied_masks(callback))
    fit_steps(path, [callback, watch], module, steps)
    return seen


def test_the_mask_never_changes_and_zeros_stay_zero(tmp_path: Path) -> None:
    callback, module = Static(0.7, distribution="uniform"), Regression()
    dense = {n: module.get_parameter(n).detach().clone() for n in NAMES}
    seen = masks_over(tmp_path, callback, module)
    assert len(seen) == 16
    for masks in seen:
        assert all(torch.equal(masks[n], seen[0][n]) for n in NAMES)
    assert callback.updates == 0
    assert callback.step == 8
    for name, mask in callback.masks.items():
        value = module.get_parameter(name)
        assert torch.equal(value != 0, mask)
        assert not torch.equal(value[mask], dense[name][mask])


def test_the_default_is_ninety_per_cent() -> None:
    assert Static().target_sparsity == 0.9
    assert Static().plan(mlp(100, 100)).total == 0.9
    assert repr(Static()).startswith("Static(sparsity=None")


def test_the_seed_decides_the_mask_and_the_global_generator_does_not(tmp_path: Path) -> None:
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        callback, module = Static(0.5, seed=seed), Regression()
        torch.manual_seed(noise)
        fit_steps(tmp_path, callback, module, 1)
        found.append(callback.masks["net.0.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_initial_mask_is_uniform_over_positions() -> None:
    callback = Static(0.5, seed=3)
    share = torch.stack([torch.rand(2000, generator=callback.generator(f"layer{i}", 0)) for i in range(5)]).mean(1)
    assert torch.allclose(share, torch.tensor(0.5), atol=0.03)  # 5 standard errors
    assert callback.generator("a", 0).initial_seed() != callback.generator("b", 0).initial_seed()
    assert callback.generator("a", 0).initial_seed() == Static(0.9, seed=3).generator("a", 0).initial_seed()


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A Lightning checkpoint of a RigL run whose last step grew weights; its masks and its state dict."""
    callback = RigL(0.6, distribution="uniform", every=1, stop=10, drop_fraction="constant(0.5)", print_plan=False)
    module = Regression()
    made = fit_steps(tmp_path, callback, module, 3)
    assert callback.updates
    path = tmp_path / "pruned.ckpt"
    made.save_checkpoint(path)
    return path, copied_masks(callback), {k: v.clone() for k, v in module.state_dict().items()}


def test_a_lightning_checkpoint_gives_its_exact_masks(pruned: Any, tmp_path: Path) -> None:
    path, masks, weights = pruned
    grown = sum(int((masks[n] & (weights[n] == 0)).sum()) for n in NAMES)
    assert grown > 0  # active and still zero: the zeros alone would lose them
    for source in (path, str(path), torch.load(path, weights_only=True)):
        callback, module = Static(from_checkpoint=source), Regression()
        module.load_state_dict(weights)
        seen = masks_over(tmp_path, callback, module)
        assert all(torch.equal(m[n], masks[n]) for m in seen for n in NAMES)
        assert callback.target_sparsity == pytest.approx(0.6)
        assert callback.plan().total == callback.measured_sparsity()["sparsity/total"] == pytest.approx(0.6)


def test_a_plain_state_dict_gives_its_zeros(pruned: Any, tmp_path: Path) -> None:
    _, _, weights = pruned
    path = tmp_path / "plain.pt"
    torch.save(weights, path)
    for source in (weights, path):
        callback = Static(from_checkpoint=source, print_plan=False)
        announced = callback.plan(Regression())
        fit_steps(tmp_path, callback, Regression(), 2)
        assert all(torch.equal(callback.masks[n], weights[n] != 0) for n in NAMES)
        assert [announced[n].zeros for n in NAMES] == [int((weights[n] == 0).sum()) for n in NAMES]


def test_only_the_mask_is_taken(pruned: Any, tmp_path: Path) -> None:
    path, masks, _ = pruned
    module = Regression(mlp(12, 20, 6, seed=5), configure=lambda p: torch.optim.SGD(p, lr=0.0))
    own = {n: module.get_parameter(n).detach().clone() for n in NAMES}
    fit_steps(tmp_path, Static(from_checkpoint=path), module, 1)
    assert all(torch.equal(module.get_parameter(n), own[n] * masks[n]) for n in NAMES)


def test_a_layer_without_zeros_stays_dense(tmp_path: Path) -> None:
    weights = Regression().state_dict()
    weights["net.0.weight"][:, ::3] = 0
    callback = Static(from_checkpoint=weights)
    fit_steps(tmp_path, callback, Regression(), 2)
    assert callback.masks["net.2.weight"].all()
    assert callback.plan()["net.2.weight"].zeros == 0
    assert callback.plan()["net.0.weight"].zeros == 80


def test_the_mask_of_a_finished_pruning_run_holds_in_fine_tuning(tmp_path: Path) -> None:
    module, gmp = Regression(), GMP(0.75, every=2, stop=6, print_plan=False)
    fit_steps(tmp_path, gmp, module, 8)
    tuned = Static(from_checkpoint={**module.state_dict()})
    fit_steps(tmp_path, tuned, module, 8)
    assert all(torch.equal(tuned.masks[n], gmp.masks[n]) for n in NAMES)
    assert tuned.at_target


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            None,
            {"from_checkpoint": "nowhere.ckpt"},
            r"from_checkpoint='nowhere\.ckpt' is not a file\. Give the path of a checkpoint or",
        ),
        (
            lambda w: w,
            {},
            r"from_checkpoint= holds no zeros in the selected weights, so there is no mask.*Give sparsity= instead",
        ),
        (
            lambda w: {k.removeprefix("net."): v for k, v in w.items()},
            {},
            r"does not fit the model: net\.0\.weight, net\.2\.weight not found with the same shape\. The checkpoint has: 0\.weight, "
            r"2\.weight\. Names must be those of the LightningModule; rename the keys, or leave layers out",
        ),
        (
            lambda w: w | {"net.0.weight": torch.zeros(3, 3)},
            {},
            r"does not fit the model: net\.0\.weight not found with the same shape",
        ),
    ],
)
def test_a_checkpoint_that_gives_no_mask_is_refused_before_training(
    change: Any, options: Any, message: str, tmp_path: Path
) -> None:
    module = Regression()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    source = options or {"from_checkpoint": change(before)}
    with pytest.raises(ValueError, match=message):
        trainer_for(Static(**source), tmp_path, max_steps=2).fit(module, loader(2))
    assert module.batches == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_sparsity_beside_a_checkpoint_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"sparsity=0\.9 and from_checkpoint= are both given, and both decide the mask\. Give one of them",
    ):
        Static(0.9, from_checkpoint="some.ckpt")
