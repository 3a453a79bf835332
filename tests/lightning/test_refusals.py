"""What cannot work is refused before the first batch, with what, why and what to do; and the remedy works."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as lightning_callbacks
from pytorch_lightning import strategies
from pytorch_lightning.plugins.precision import MixedPrecision
from support.data import loader
from support.inside import when_masks_are_made
from support.nets import Regression, sgd
from support.rig import copied_masks, fit_steps
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks import GMP, SET, SNFS, RigL, SparsityCallback, Static, saved_masks
from sparse_callbacks.lightning.refusals import refuse_host
from sparse_callbacks.methods.drop_and_grow import DropAndGrow
from sparse_callbacks.testing.runs import trainer_for

METHODS = [RigL, SET, SNFS, Static, GMP]
FADING = [RigL, SET, SNFS]


def refused(
    path: Path, callbacks: Any, message: str, module: Regression | None = None, ckpt_path: Any = None, **options: Any
) -> None:
    """Fit raises ``message`` before the first batch, and leaves every weight and its momentum as it was."""
    module = Regression() if module is None else module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    made = trainer_for(callbacks, path, **({"max_steps": 4} | options))
    with pytest.raises(ValueError, match=message):
        made.fit(module, loader(4), ckpt_path=ckpt_path)
    assert module.batches == 0
    if ckpt_path is None:
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 90, True, float("nan")])
def test_a_sparsity_outside_its_range(method: Any, sparsity: Any) -> None:
    message = (
        r"sparsity=.* is (not in \[0, 1\)|not a number).* is the fraction of zeros[.:] [Ff]or 90 % zeros write 0\.9"
    )
    with pytest.raises(ValueError, match=message):
        method(sparsity=sparsity)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_other_arguments_out_of_range(method: Any) -> None:
    with pytest.raises(ValueError, match=r"keep_dense='stem' is not known\. Give 'first', 'last', 'both' or None"):
        method(keep_dense="stem")
    for seed in (1.5, True, None, "0"):
        with pytest.raises(ValueError, match=r"seed=.* is not a whole number\. Give for example seed=0"):
            method(seed=seed)
    with pytest.raises(TypeError, match="amount"):
        method(amount=0.5)


@pytest.mark.parametrize("method", FADING, ids=lambda m: m.__name__)
@pytest.mark.parametrize("fraction", [1.1, -0.1, "linear(0.3, 2)", "constant(-1)"])
def test_a_drop_fraction_outside_its_range(method: Any, fraction: Any) -> None:
    with pytest.raises(
        ValueError, match=r"drop_fraction=.* leaves \[0, 1\]: it is the fraction of .* The published value is 0\.3"
    ):
        method(drop_fraction=fraction)


@pytest.mark.parametrize("method", FADING, ids=lambda m: m.__name__)
def test_an_unknown_schedule(method: Any) -> None:
    with pytest.raises(ValueError, match=r"'sine' is not a curve\. Known curves: constant, cosine"):
        method(drop_fraction="sine(0.3)")
    with pytest.raises(ValueError, match=r"'sine' is not a curve"):
        GMP("sine(0.9)")


@pytest.mark.parametrize("method", [*FADING, GMP], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"start": 10, "stop": 5}, r"stop=5 lies before start=10\. Give a stop at or after the start"),
        ({"every": 20, "start": 0, "stop": 10}, r"every=20 is longer than stop - start.*Give a smaller every="),
        ({"every": 0}, r"every=0 is not an interval"),
        ({"stop": 2.0}, r"stop=2\.0 is outside \[0, 1\]"),
    ],
)
def test_impossible_times(method: Any, times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**times)


@pytest.mark.parametrize("method", [*FADING, GMP], ids=lambda m: m.__name__)
def test_an_interval_longer_than_this_run(method: Any, tmp_path: Path) -> None:
    refused(
        tmp_path,
        method(0.5, every=100),
        r"every=100 is longer than stop - start .* \(100 steps against 3\).*a longer run",
    )
    refused(tmp_path, method(0.5, start=50), r"stop=0\.75 \(3 steps\) lies before start=50 \(50 steps\)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": "foo*"},
            r"include=\['foo\*'\] matches no parameter .* Candidates: net\.0\.weight, net\.2\.weight",
        ),
        ({"exclude": "foo*"}, r"exclude=\['foo\*'\] matches no parameter"),
        ({"exclude": "*"}, r"no parameter is left to make sparse"),
        ({"distribution": {"foo*": 0.5}}, r"distribution: 'foo\*' matches no sparse layer"),
        ({"sparsity": 0.9999}, r"sparsity=0\.9999 cannot be reached.*The highest reachable sparsity is 0\.994444"),
    ],
)
def test_arguments_that_do_not_fit_the_model(options: Any, message: str, tmp_path: Path) -> None:
    refused(tmp_path, Static(**{"sparsity": 0.5, **options}), message)


def test_what_needs_a_fit_says_so() -> None:
    with pytest.raises(
        RuntimeError, match=r"RigL has no masks yet: they are made at the start of fit\. Before that, see plan\(model\)"
    ):
        RigL(0.9).measured_sparsity()
    with pytest.raises(RuntimeError, match=r"RigL has no calendar: it is made when fit starts"):
        _ = RigL(0.9).fraction


def test_a_method_without_scores_to_grow_by(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        DropAndGrow(0.5, print_plan=False).grow_scores(None, "net.0.weight")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- optimizers


def test_lbfgs(tmp_path: Path) -> None:
    module = Regression(configure=lambda p: torch.optim.LBFGS(p))
    refused(
        tmp_path,
        RigL(0.5),
        r"LBFGS calls its closure several times in one step.*Use an optimizer with one gradient a step",
        module,
    )


class TwoClosures(torch.optim.SGD):
    """Climbs, and asks for the gradient there, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_another_optimizer_that_calls_its_closure_twice(method: Any, tmp_path: Path) -> None:
    module = Regression(configure=lambda p: TwoClosures(p, lr=0.1))
    made = trainer_for(method(0.5), tmp_path, max_steps=4)
    with pytest.raises(ValueError, match=r"TwoClosures calls its closure several times in one step"):
        made.fit(module, loader(4))
    assert made.global_step == 0


def test_a_fused_optimizer_under_a_gradient_scaler(tmp_path: Path) -> None:
    def precision() -> Any:
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))

    fused = Regression(configure=lambda p: torch.optim.AdamW(p, fused=True))
    refused(
        tmp_path,
        RigL(0.5),
        r"AdamW\(fused=True\) under precision='16-mixed'.*Use precision='bf16-mixed', or fused=False",
        fused,
        plugins=[precision()],
    )
    fit_steps(
        tmp_path, RigL(0.5), Regression(configure=lambda p: torch.optim.AdamW(p, fused=False)), 2, plugins=[precision()]
    )


class Manual(Regression):
    """Manual optimization through Lightning's optimizer or through the raw one."""

    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_a_raw_optimizer_in_manual_optimization(tmp_path: Path) -> None:
    message = r"SGD\.step\(\) was called past the host, so RigL saw no gradients.*step through self\.optimizers\(\), not through the raw"
    with pytest.raises(RuntimeError, match=message):
        fit_steps(tmp_path, RigL(0.5, every=2, stop=8), Manual(raw=True), 4)
    callback = RigL(0.5, every=2, stop=8)
    fit_steps(tmp_path, callback, Manual(raw=False), 6)
    assert callback.updates == 2


# ---------------------------------------------------------------------- trainers


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_keep_parameters_in_pieces(name: str, tmp_path: Path) -> None:
    real = getattr(strategies, name)
    with pytest.raises(
        ValueError,
        match=rf"{name} keeps parameters in pieces that do not follow their shapes.*Use ModelParallelStrategy",
    ):
        refuse_host(SimpleNamespace(strategy=object.__new__(real), callbacks=[]))
    stand_in = type(name, (strategies.SingleDeviceStrategy,), {})("cpu")  # the real ones need a GPU
    refused(tmp_path, RigL(0.5), rf"{name} keeps parameters in pieces", strategy=stand_in)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_callback_that_would_re_parametrise_the_weights(ours_first: bool, tmp_path: Path) -> None:
    message = r"ModelPruning re-parametrises the weights that this callback masks\. Keep one of the two"
    other = lightning_callbacks.ModelPruning("l1_unstructured", amount=0.5, parameters_to_prune=None)
    if ours_first:
        refused(tmp_path, [RigL(0.5), other], message)
    else:  # the other one's setup may have changed the model by then
        module = Regression()
        with pytest.raises(ValueError, match=message):
            trainer_for([other, RigL(0.5)], tmp_path, max_steps=4).fit(module, loader(4))
        assert module.batches == 0


def test_two_callbacks_that_claim_one_parameter(tmp_path: Path) -> None:
    both = [RigL(0.5, include="net.0*"), SET(0.5)]
    refused(
        tmp_path,
        both,
        r"RigL and SET both claim net\.0\.weight\. Give each callback its own layers with include= or exclude=",
    )
    pair = [RigL(0.5, include="net.0*"), SET(0.5, exclude="net.0*")]
    fit_steps(tmp_path, pair, Regression(), 4)
    assert [list(c.masks) for c in pair] == [["net.0.weight"], ["net.2.weight"]]


class Stream(IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(12), torch.ones(6)


@pytest.mark.parametrize("method", [*FADING, GMP], ids=lambda m: m.__name__)
@pytest.mark.parametrize("endless", ["epochs", "stream"])
def test_a_fraction_of_an_endless_run(method: Any, endless: str, tmp_path: Path) -> None:
    data: Any = loader(4) if endless == "epochs" else DataLoader(Stream(), batch_size=4)
    length = {"max_epochs": -1} if endless == "epochs" else {"max_epochs": 1}
    module = Regression()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"stop=0\.75 is a fraction of a run whose length is not known.*max_steps=.*in integer steps"
    ):
        trainer_for(method(0.5), tmp_path, **length).fit(module, data)
    assert module.batches == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())

    stopper = pl.Callback()
    stopper.on_train_batch_end = lambda made, *_: setattr(made, "should_stop", made.global_step >= 14)
    callback = method(0.5, every=2, stop=10)  # the first remedy
    trainer_for([callback, stopper], tmp_path, **length, min_epochs=0).fit(Regression(), data)
    assert callback.updates >= 1
    callback = method(0.5)  # the second one
    trainer_for(callback, tmp_path, max_steps=12).fit(Regression(), data)
    assert callback.updates >= 1


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_trial_runs_and_evaluation_never_trip_a_refusal(method: Any, tmp_path: Path) -> None:
    module = Regression(configure=lambda p: sgd(p))
    module.validation_step = module.test_step = module.predict_step = lambda batch, batch_idx: module.net(batch[0])
    times = {} if method is Static else {"every": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_for(method(0.5, **times), tmp_path, fast_dev_run=True).fit(module, loader(2), loader(2))
        made = trainer_for([method(0.5, include="foo*", **times), lightning_callbacks.EMAWeightAveraging()], tmp_path)
        made.validate(module, loader(2), verbose=False)
        made.test(module, loader(2), verbose=False)
        made.predict(module, loader(2))
        callback = method(0.5)
        trainer_for(callback, tmp_path, max_steps=4, num_sanity_val_steps=2).fit(module, loader(4), loader(4))
    assert callback.masks


# ---------------------------------------------------------------------- checkpoints


def saved(path: Path, callbacks: Any, module: Regression | None = None, steps: int = 3) -> Path:
    made = fit_steps(path, callbacks, Regression() if module is None else module, steps)
    made.save_checkpoint(path / "run.ckpt")
    return path / "run.ckpt"


def rigl(**options: Any) -> RigL:
    return RigL(**{"sparsity": 0.5, "every": 2, "stop": 20, "print_plan": False, **options})


def resumed(path: Path, callback: SparsityCallback, checkpoint: Path, module: Regression | None = None) -> None:
    trainer_for(callback, path, max_steps=8).fit(
        Regression() if module is None else module, loader(12), ckpt_path=checkpoint
    )


def test_a_checkpoint_without_our_state(tmp_path: Path) -> None:
    for others in ([], [SET(0.5, every=2, stop=20)], [rigl(include="net.0*")]):
        checkpoint = saved(tmp_path, others)
        message = r"the checkpoint .*run\.ckpt holds no state of RigL.*its weights come without masks\..*or give fresh_start=True"
        refused(tmp_path, rigl(), message, ckpt_path=checkpoint)
    callback = rigl(fresh_start=True)
    resumed(tmp_path, callback, checkpoint)
    assert callback.updates >= 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity": 0.6}, r"sparsity=0\.5 there and sparsity=0\.6 here"),
        ({"every": 3}, r"every=2 there and every=3 here"),
        ({"stop": 30, "seed": 4}, r"stop=20 there and stop=30 here, seed=0 there and seed=4 here"),
        ({"drop_fraction": "constant(0.3)"}, r"drop_fraction=0\.3 there and drop_fraction='constant\(0\.3\)' here"),
        ({"distribution": "uniform"}, r"distribution='erdos_renyi_kernel' there and distribution='uniform' here"),
        ({"keep_dense": "first"}, r"keep_dense=None there and keep_dense='first' here"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_a_checkpoint_of_other_arguments(change: Any, words: str, tmp_path: Path) -> None:
    first = rigl()
    checkpoint = saved(tmp_path, first)
    refused(
        tmp_path,
        rigl(**change),
        rf"was written by RigL with other arguments: {words}\. Give the same, or fresh_start=True",
        ckpt_path=checkpoint,
    )
    callback = rigl(**change, fresh_start=True)
    resumed(tmp_path, callback, checkpoint)
    assert callback.step > first.step or callback.updates


def test_print_plan_and_fresh_start_may_differ(tmp_path: Path) -> None:
    first = rigl()
    checkpoint = saved(tmp_path, first)
    callback = rigl(print_plan=True)
    resumed(tmp_path, callback, checkpoint)
    assert callback.step + callback.updates == 8


def test_a_fresh_start_makes_new_masks_and_counts_from_zero(tmp_path: Path) -> None:
    first = rigl(seed=1)
    checkpoint = saved(tmp_path, first)
    callback, seen = rigl(seed=1, fresh_start=True), []
    when_masks_are_made(callback, lambda: seen.append(1))
    resumed(tmp_path, callback, checkpoint)
    assert seen == [1]
    assert callback.step + callback.updates == 8 - 3


def test_a_checkpoint_whose_masks_do_not_fit(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, rigl())
    content = torch.load(checkpoint, weights_only=True)
    state = next(s for s in content["callbacks"].values() if "masks" in s)
    for part in ("masks", "aux"):  # which the run cannot have begun without: the layer is trained, and it awaited none
        state[part] = {k: t for k, t in state[part].items() if "net.2.weight" not in k}
    del content["sparse_callbacks"]  # the inventory of the state
    torch.save(content, checkpoint)
    message = r"the checkpoint's masks do not fit the model: net\.2\.weight differ in name or shape\. Resume with.*or give fresh_start=True"
    refused(tmp_path, rigl(), message, ckpt_path=checkpoint)
    module = Regression()
    module.net[2].weight.requires_grad_(False)
    module.configure = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    callback = rigl(fresh_start=True)
    resumed(tmp_path, callback, checkpoint, module)
    assert list(callback.masks) == ["net.0.weight"]


def test_a_layer_that_is_frozen_where_a_checkpoint_has_its_mask_keeps_it(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, rigl())
    mask = saved_masks(checkpoint)["net.2.weight"]
    module, callback = Regression(), rigl()
    module.net[2].weight.requires_grad_(False)
    module.configure = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    resumed(tmp_path, callback, checkpoint, module)
    assert torch.equal(callback.masks["net.2.weight"], mask)
    assert callback.plan()["net.2.weight"].reason == ""


def test_a_checkpoint_of_a_later_version(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, rigl())
    content = torch.load(checkpoint, weights_only=True)
    (key,) = (k for k in content["callbacks"] if "RigL" in k)
    content["callbacks"][key]["version"] = 99
    torch.save(content, checkpoint)
    refused(
        tmp_path,
        rigl(),
        r"sparsity state of version 99, and this package reads up to 2\. Upgrade",
        ckpt_path=checkpoint,
    )


def test_a_callback_serves_a_second_model_after_a_refusal(tmp_path: Path) -> None:
    callback = Static(0.5, include="net.0*")
    refused(
        tmp_path,
        callback,
        r"matches no parameter",
        Regression(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(12, 6))),
    )
    fit_steps(tmp_path, callback, Regression(), 2)
    assert list(copied_masks(callback)) == ["net.0.weight"]
