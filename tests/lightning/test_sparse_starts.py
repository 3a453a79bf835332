"""Given first masks and rescaled weights under a Trainer: plan, fit, resume, a second fit, refusals and train.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning import callbacks as lightning_callbacks
from support.data import loader
from support.nets import Regression, mlp
from support.rig import copied_masks, fit_steps, short_callback
from torch import Tensor, nn

from sparse_callbacks import GMP, SET, GaP, ParallelGaP, RigL, Static, saved_masks
from sparse_callbacks.tasks.build import build_method
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
CONF = Path(__file__).parents[2] / "conf"


def at_rest(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def pruned_module(share: float = 0.5) -> tuple[Regression, dict[str, Tensor]]:
    module, source, masks = Regression(), torch.Generator().manual_seed(0), {}
    for name, p in module.named_parameters():
        if p.ndim > 1:
            masks[name] = torch.rand(p.shape, generator=source) >= share
            p.data *= masks[name]
    return module, masks


def values(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("make", [Static, SET, RigL], ids=lambda m: m.__name__)
def test_somebodys_pruned_model_goes_on_with_its_masks(make: Any, tmp_path: Path) -> None:
    module, masks = pruned_module()
    callback = make(initial_mask="nonzero", print_plan=False, **({} if make is Static else {"every": 2, "stop": 8}))
    announced = callback.plan(torch.compile(module))
    seen = []
    watch = lightning_callbacks.LambdaCallback(on_train_start=lambda *_: seen.append(copied_masks(callback)))
    fit_steps(tmp_path, [callback, watch], module, 8)
    assert same(seen[0], masks)
    assert [(r.name, r.zeros) for r in announced] == [(r.name, r.zeros) for r in callback.plan()]
    assert {n: int(m.sum()) for n, m in callback.masks.items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert callback.target_sparsity == callback.measured_sparsity()["sparsity/total"] == callback.plan().total


def test_a_checkpoint_of_ours_is_continued_with_another_stop(tmp_path: Path) -> None:
    callback, module = RigL(0.6, every=2, stop=6, print_plan=False), Regression()
    fit_steps(tmp_path, callback, module, 7).save_checkpoint(tmp_path / "last.ckpt")
    masks = copied_masks(callback)
    other = Regression(mlp(12, 20, 6, seed=3))
    other.load_state_dict(torch.load(tmp_path / "last.ckpt")["state_dict"])
    start = values(other)
    goes_on = RigL(initial_mask=tmp_path / "last.ckpt", every=2, stop=12, print_plan=False)
    seen: list[Any] = []
    watch = lightning_callbacks.LambdaCallback(
        on_train_start=lambda *_: seen.append((copied_masks(goes_on), values(other)))
    )
    fit_steps(tmp_path, [goes_on, watch], other, 14)
    assert same(seen[0][0], masks)
    assert same(seen[0][1], start)
    assert goes_on.updates > 4


@pytest.mark.parametrize("make", [Static, RigL, GaP], ids=lambda m: m.__name__)
def test_a_resumed_fit_needs_the_file_no_more(make: Any, tmp_path: Path) -> None:
    module, masks = pruned_module()
    source = tmp_path / "pruned.pt"
    torch.save(module.state_dict(), source)
    more = {Static: {}, RigL: {"every": 2, "stop": 8}, GaP: {"partitions": 2, "every": 3, "restart": False}}[make]
    callback = make(initial_mask=str(source), print_plan=False, **more)
    straight = make(initial_mask=str(source), print_plan=False, **more)
    trainer_for(straight, tmp_path, max_epochs=2).fit(pruned_module()[0], loader(4))
    stops = lightning_callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, _: trainer.global_step == 4 and trainer.save_checkpoint(tmp_path / "4.ckpt")
    )
    trainer_for([stops, callback], tmp_path, max_epochs=2).fit(module, loader(4))
    source.unlink()
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["arguments"]["initial_mask"] == repr(str(source))
    resumed, other = make(initial_mask=str(tmp_path / "gone.pt"), print_plan=False, **more), Regression()
    trainer_for(resumed, tmp_path, max_epochs=2).fit(other, loader(4), ckpt_path=tmp_path / "4.ckpt")
    assert same(resumed.masks, straight.masks)
    assert resumed.plan().zeros == straight.plan().zeros == sum(int((~m).sum()) for m in masks.values())
    read = make(initial_mask=str(tmp_path / "gone.pt"), print_plan=False, **more)
    other.validation_step = other.test_step = lambda *_: None
    trainer_for(read, tmp_path).test(other, loader(2), ckpt_path=tmp_path / "4.ckpt", verbose=False)
    assert same(read.masks, saved_masks(tmp_path / "4.ckpt"))


def test_workers_of_parallel_gap_begin_with_the_given_masks(tmp_path: Path) -> None:
    module, masks = pruned_module()
    callback = ParallelGaP(initial_mask="nonzero", partitions=2, rounds=1, print_plan=False)
    seen: list[Any] = []
    watch = lightning_callbacks.LambdaCallback(on_train_batch_end=lambda *_: seen.append(copied_masks(callback)))
    trainer_for([callback, watch], tmp_path, max_epochs=3).fit(module, loader(4))
    first, second = masks
    assert bool(seen[0][first].all())
    assert torch.equal(seen[0][second], masks[second])
    assert torch.equal(seen[4][first], masks[first])  # of the second worker, which begins where the first did
    assert bool(seen[4][second].all())
    assert {n: int(m.sum()) for n, m in callback.masks.items()} == {n: int(m.sum()) for n, m in masks.items()}


def test_the_masks_of_gmp_at_any_time_are_those_of_the_next_run(tmp_path: Path) -> None:
    callback, module = GMP(0.8, every=2, stop=8, print_plan=False), Regression()
    stops = lightning_callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, *_: trainer.global_step == 5 and trainer.save_checkpoint(tmp_path / "5.ckpt")
    )
    fit_steps(tmp_path, [callback, stops], module, 9)
    tuned = SET(initial_mask=tmp_path / "5.ckpt", every=100, stop=200, print_plan=False)
    fit_steps(tmp_path, tuned, Regression(configure=at_rest), 1)
    kept = {n: int(m.sum()) for n, m in saved_masks(tmp_path / "5.ckpt").items()}
    assert {n: int(m.sum()) for n, m in tuned.masks.items()} == kept


# ---------------------------------------------------------------------- rescaled weights


@pytest.mark.parametrize("rescale", ["layer", "fan_in"])
def test_a_fit_rescales_once_and_no_fit_that_goes_on_does(rescale: Any, tmp_path: Path) -> None:
    module, plain = Regression(configure=at_rest), Regression()
    callback = Static(0.5, rescale=rescale, print_plan=False)
    fit_steps(tmp_path, callback, module, 2).save_checkpoint(tmp_path / "2.ckpt")
    for name, mask in callback.masks.items():
        share = mask.float().mean(1, keepdim=True) if rescale == "fan_in" else mask.float().mean()
        expected = torch.where(mask, plain.get_parameter(name).detach() / share.sqrt(), 0.0)
        assert torch.allclose(module.get_parameter(name).detach(), expected)
    rescaled = values(module)
    fit_steps(tmp_path, callback, module, 2)
    assert same(values(module), rescaled)
    other = Regression(mlp(12, 20, 6, seed=3), configure=at_rest)
    resumed = Static(0.5, rescale=rescale, print_plan=False)
    trainer_for(resumed, tmp_path, max_steps=4).fit(other, loader(4), ckpt_path=tmp_path / "2.ckpt")
    assert same(values(other), rescaled)


def test_the_weights_of_a_checkpoint_are_not_rescaled_by_a_fresh_start(tmp_path: Path) -> None:
    trainer = trainer_for([], tmp_path, max_steps=2)
    trainer.fit(Regression(), loader(2))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    callback = RigL(0.5, rescale="layer", fresh_start=True, print_plan=False)
    with pytest.raises(
        ValueError, match=r"with fresh_start=True a new run begins with the trained ones of the checkpoint"
    ):
        trainer_for(callback, tmp_path, max_steps=4).fit(Regression(), loader(4), ckpt_path=tmp_path / "dense.ckpt")


def test_a_fit_that_is_refused_after_the_weights_were_rescaled_gives_them_back(tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("somebody refuses")

    module = Regression(configure=at_rest)
    before, callback = values(module), short_callback(RigL, rescale="fan_in")
    with pytest.raises(ValueError, match="somebody refuses"):
        fit_steps(tmp_path, [callback, lightning_callbacks.LambdaCallback(on_train_start=refuse)], module, 4)
    assert same(values(module), before)
    fit_steps(tmp_path, callback, module, 1)
    twin = Regression(configure=at_rest)
    fit_steps(tmp_path, short_callback(RigL, rescale="fan_in"), twin, 1)
    assert same(values(module), values(twin))
    assert not same(values(module), before)


def test_a_trainer_warns_of_a_random_mask_over_a_pruned_model(tmp_path: Path) -> None:
    module = pruned_module()[0]
    with pytest.warns(
        UserWarning, match=r"RigL draws its masks at random, and \d+\.\d% of the weights are zero already"
    ):
        fit_steps(tmp_path, short_callback(RigL), module, 2)


# ---------------------------------------------------------------------- train.py


@pytest.mark.parametrize("name", ["static", "set", "rigl", "snfs", "ctre", "gap", "gap_parallel"])
def test_both_arguments_come_through_a_configuration(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        for given in ("random", "magnitude", "nonzero", "some/last.ckpt"):
            made: Any = build_method(
                compose("train", [f"method={name}", f"method.initial_mask={given}", "method.rescale=fan_in"])
            )
            assert (made.initial_mask, made.rescale) == (given, "fan_in")


def test_the_older_names_are_spellings_of_the_argument(tmp_path: Path) -> None:
    module, masks = pruned_module()
    state = copy.deepcopy(module.state_dict())
    older, newer = Static(from_checkpoint=state, print_plan=False), Static(initial_mask=state, print_plan=False)
    for callback in (older, newer):
        fit_steps(tmp_path, callback, Regression(), 1)
        assert same(callback.masks, masks)
    one, other = (GaP(0.5, partitions=2, print_plan=False, **{name: "magnitude"}) for name in ("init", "initial_mask"))
    for callback in (one, other):
        fit_steps(tmp_path, callback, Regression(), 4)
    assert same(one.masks, other.masks)
