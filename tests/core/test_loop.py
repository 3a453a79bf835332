"""`sparsify`: a run in a hand-written loop, from its first masks to close()."""

import copy
import gc
import io
import math
import warnings
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.loops import (
    EPOCH,
    METHODS,
    STEPS,
    adamw,
    assert_masked,
    assert_same,
    batches,
    begin,
    conv_net,
    data,
    half_precision,
    loss_of,
    net,
    sgd,
    train,
)
from torch import Tensor, nn

from sparse_callbacks import CTRE, GMP, SET, SMCP, ConstrainedL0, GaP, ParallelGaP, RigL, Static, Step
from sparse_callbacks.core.loop import sparsify


@pytest.mark.combinations
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_says_what_it_has_come_to(method: str, make: Any) -> None:
    model = net()
    optimizer = make(model)
    first = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a density that so short a run cannot reach
        with begin(method, model, optimizer) as run:
            assert_masked(model, run)
            train(run, model, optimizer)
            assert run.masks.keys() == {"0.weight", "2.weight", "4.weight"} or method in ("smcp", "channels")
            replaced = run.updates if method == "rigl" else 0
            assert run.step == STEPS - replaced
            assert (run.updates > 0) == (method not in ("static", "crop", "l0", "nm soft"))
            assert {f"sparsity/{n}" for n in run.masks} <= run.measured_sparsity().keys()
            assert run.figures().items() >= run.measured_sparsity().items()
            assert ("update/changed" in run.figures()) == (run.updates > 0)
            assert run.plan()["0.weight"].size == 288
            assert not run.is_closed
    assert run.is_closed
    assert_masked(model, run)
    assert not torch.equal(model[0].weight, first)


def test_masks_are_written_before_the_call_returns() -> None:
    model = net()
    target = copy.deepcopy(model)
    run = begin("rigl", model, sgd(model))
    assert_masked(model, run)
    assert sum(int((~m).sum()) for m in run.masks.values()) == run.plan().zeros > 0
    copied = copy.deepcopy(model)
    assert_same(copied, model)
    target.load_state_dict(model.state_dict())  # a target network
    assert_masked(target, run)
    assert all(p._post_accumulate_grad_hooks is None for p in copied.parameters())


def test_the_model_can_be_saved_whole_during_a_run() -> None:
    model = net()
    begin("rigl", model, sgd(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), model)


def test_the_plan_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    run = sparsify(Static(0.8), model, sgd(model), STEPS)
    assert capsys.readouterr().out == f"{run.plan()}\n"


# ---------------------------------------------------------------------- close()


def test_close_takes_all_hooks_away_and_may_be_called_twice() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("static", model, optimizer)
    train(run, model, optimizer, last=3)
    run.close()
    run.close()
    assert run.is_closed
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    for batch in batches(data(), 0, 3):
        loss_of(model, batch).backward()
        optimizer.step()
    assert run.step == 3
    assert any(model.get_parameter(n).detach()[~m].any() for n, m in run.masks.items())


@pytest.mark.parametrize(
    "use",
    [
        lambda run, optimizer: run.before_clipping(optimizer),
        lambda run, optimizer: run.epoch_end(),
        lambda run, optimizer: run.batch().__enter__(),
        lambda run, optimizer: run.load_state_dict(run.state_dict()),
    ],
)
def test_a_closed_run_refuses_to_go_on(use: Any) -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("static", model, optimizer)
    run.close()
    with pytest.raises(RuntimeError, match=r"this run is closed. Begin another one with sparsify\(\)"):
        use(run, optimizer)
    assert run.state_dict()["masks"].keys() == run.masks.keys()  # what it has come to stays readable


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_block_leaves_masked_weights_and_no_hooks(method: str) -> None:
    model = net()
    optimizer = sgd(model)
    run = begin(method, model, optimizer)

    def interrupted() -> None:
        with run:
            train(run, model, optimizer, last=5)
            with run.batch():
                loss_of(model, next(batches(data(), 5, 6))).backward()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert run.is_closed
    assert_masked(model, run)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_target_that_was_not_reached_is_reported() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("gmp", model, optimizer)
    train(run, model, optimizer, last=6)
    with pytest.warns(UserWarning, match="GMP ended at sparsity .* before its target of 0.79"):
        run.close()


def test_gap_prunes_its_last_partition_at_close_where_skipped_steps_have_delayed_it() -> None:
    """The last step of the run is among them: no later backward pass shows that it was skipped."""
    model = net()
    optimizer = sgd(model)
    run = begin(GaP(0.8, partitions=2, every=12, restart=False, print_plan=False), model, optimizer)
    half_precision(run, model, optimizer, (3, STEPS - 1))
    assert run.step == STEPS - 2
    assert run.measured_sparsity()["sparsity/total"] < 0.79
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.close()
    assert run.measured_sparsity()["sparsity/total"] == pytest.approx(run.plan().total)
    assert_masked(model, run)


def test_gap_does_not_prune_where_the_loop_ended_early() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin(GaP(0.8, partitions=2, every=12, restart=False, print_plan=False), model, optimizer)
    for batch in batches(data(), 0, 20):  # windows of two: no step was skipped
        loss_of(model, batch).backward()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="GaP ended after 20 steps, in phase 1 of 2"):
        run.close()
    assert run.measured_sparsity()["sparsity/total"] < 0.79


def test_a_method_goes_on_after_close_and_belongs_to_one_run_at_a_time() -> None:
    model, method = net(), Static(0.8, print_plan=False)
    optimizer = sgd(model)
    run = sparsify(method, model, optimizer, STEPS)
    with pytest.raises(ValueError, match=r"this Static is in another run\. Make a new one for every call"):
        sparsify(method, net(), optimizer, STEPS)
    masks = run.masks
    run.close()
    again = sparsify(method, model, optimizer, STEPS)
    assert all(torch.equal(again.masks[n], m) for n, m in masks.items())


# ---------------------------------------------------------------------- arguments that cannot be


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": RigL}, TypeError, r"is not a method. Give an instance, such as RigL\(0.9\)"),
        ({"model": "net"}, TypeError, "model='net' is not a torch module"),
        ({"optimizer": None}, TypeError, "NoneType is not a torch optimizer. Give the optimizer, or a list"),
        (
            {"steps": 0},
            ValueError,
            "steps=0 is not a number of optimizer steps. Give that of the whole run, or math.inf",
        ),
        ({"steps": 2.5}, ValueError, "steps=2.5 is not a number of optimizer steps"),
        ({"steps": True}, ValueError, "steps=True is not a number of optimizer steps"),
        ({"epoch": 0}, ValueError, "epoch=0 is not the number of optimizer steps in an epoch. Give 1 or more"),
        ({"epoch": 2.0}, ValueError, "epoch=2.0 is not the number of optimizer steps in an epoch"),
        ({"clip": 1.0}, TypeError, "clip=1.0 is not a function"),
        ({"on_restart": "now"}, TypeError, "on_restart='now' is not a function"),
        (
            {"method": ParallelGaP(partitions=2, epochs=1)},
            ValueError,
            "ParallelGaP trains several networks.*needs a Trainer",
        ),
        ({"method": GaP()}, ValueError, r"GaP\(restart=True\) starts the optimizers anew .* Give .*on_restart="),
        ({"method": CTRE()}, ValueError, r"the training loader has no length. Give every= .* or epoch= where sparsify"),
        (
            {"method": CTRE(), "epoch": 5},
            ValueError,
            r"CTRE runs the network on training data. Give sparsify\(..., data=",
        ),
        ({"method": CTRE(every=4)}, ValueError, r"CTRE runs the network on training data. Give sparsify\("),
        (
            {"method": CTRE(stop=99), "steps": math.inf, "data": iter([])},
            ValueError,
            "every=None is one update an epoch",
        ),
        (
            {"method": GaP(epochs=1, restart=False)},
            ValueError,
            "epochs=1 cannot be counted in steps: the train loader has",
        ),
        ({"method": GMP(0.8), "steps": math.inf}, ValueError, r"a fraction of a run .* or the steps of sparsify\(\)"),
        ({"method": Static(0.8, include="none*")}, ValueError, "include=.*none.* matches no parameter"),
    ],
)
def test_what_cannot_be_a_run_is_refused_and_changes_nothing(changes: Any, error: Any, message: str) -> None:
    model = net()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    arguments = {"method": Static(0.8), "model": model, "optimizer": optimizer, "steps": STEPS} | changes
    with pytest.raises(error, match=message):
        sparsify(**arguments)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    begin("static", model, optimizer)  # nobody claims the layers


def test_a_refused_method_can_begin_once_it_has_what_it_needs() -> None:
    model, method = net(), CTRE(0.8, every=4, print_plan=False)
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="Give sparsify"):
        sparsify(method, model, optimizer, STEPS)
    assert method.masks == {}
    run = sparsify(method, model, optimizer, STEPS, data=data())
    train(run, model, optimizer)
    assert run.updates > 0


def test_a_refused_second_run_leaves_the_masks_of_the_first() -> None:
    model, method = net(), CTRE(0.8, every=4, print_plan=False)
    optimizer = sgd(model)
    run = sparsify(method, model, optimizer, STEPS, data=data())
    train(run, model, optimizer)
    run.close()
    masks, step = run.masks, run.step
    with pytest.raises(ValueError, match="Give sparsify"):
        sparsify(method, model, optimizer, STEPS)
    assert all(torch.equal(method.masks[n], m) for n, m in masks.items())
    assert method.step == step == STEPS


def test_steps_may_be_unknown_where_times_are_whole_numbers() -> None:
    model = net()
    optimizer = sgd(model)
    run = sparsify(RigL(0.8, every=4, stop=20, print_plan=False), model, optimizer, math.inf)
    train(run, model, optimizer)
    assert run.updates > 0


def test_an_epoch_is_as_long_as_the_data() -> None:
    for epoch, every in ((None, EPOCH), (5, 5)):
        model = net()
        run = sparsify(CTRE(0.8, print_plan=False), model, sgd(model), STEPS, epoch=epoch, data=data())
        assert run.method.times.every == every


def test_a_run_without_updates_is_announced() -> None:
    model = net()
    with pytest.warns(UserWarning, match="RigL will not move a mask in this run"):
        sparsify(RigL(0.8, every=5, start=30, stop=40, print_plan=False), model, sgd(model), STEPS)


def test_an_update_after_the_last_step_is_not_announced_as_none() -> None:
    model = net()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = sparsify(SET(0.8, every=5, start=STEPS, stop=40, print_plan=False), model, optimizer, STEPS)
    train(run, model, optimizer)
    assert run.updates == 1


# ---------------------------------------------------------------------- what some methods need


def test_gates_are_sampled_inside_of_batch_and_medians_outside() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("l0", model, optimizer)
    loader = list(batches(data(), 0, 5))
    medians, samples = [], []
    for first, second in pairwise(loader):
        medians.append(model[0].weight.detach().clone())
        for number, batch in enumerate((first, second)):
            with run.batch():
                if number:  # one sample through a window
                    assert torch.equal(model[0].weight, samples[-1])
                else:
                    samples.append(model[0].weight.detach().clone())
                loss_of(model, batch).backward()
            assert torch.equal(model[0].weight, medians[-1])
            assert torch.equal(copy.deepcopy(model)[0].weight, medians[-1])
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(s, m) for s, m in zip(samples, medians, strict=True))
    assert all(not torch.equal(one, two) for one, two in pairwise(samples))


def test_the_step_may_be_inside_of_batch() -> None:
    found = []
    for inside in (True, False):
        model = net()
        optimizer = sgd(model)
        run = begin("l0", model, optimizer)
        for batch in batches(data(), 0, STEPS):
            with run.batch():
                loss_of(model, batch).backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
            optimizer.zero_grad()
            assert_masked(model, run)
        found.append(model)
    assert_same(*found)


def test_a_step_of_gates_without_batch_is_refused() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("l0", model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    message = r"ConstrainedL0 samples its gates for each micro-batch.* Put 'with run.batch\(\):' around"
    loss_of(model, next(batches(data(), 0, 1))).backward()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    optimizer.zero_grad()
    train(run, model, optimizer, last=3)
    with run.batch():
        loss_of(model, next(batches(data(), 0, 1))).backward()
    loss_of(model, next(batches(data(), 0, 1))).backward()  # one of two micro-batches without it
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_batch_is_not_entered_twice() -> None:
    model = net()
    run = begin("l0", model, sgd(model))
    with run.batch(), pytest.raises(RuntimeError, match="entered inside of another"), run.batch():
        pass


def test_ctre_grows_at_random_when_its_metric_stops_to_improve() -> None:
    model = net()
    optimizer = sgd(model)
    method = CTRE(0.8, variant="seq", every=4, monitor="accuracy", patience=2, print_plan=False)
    run = begin(method, model, optimizer)
    for epoch in range(4):
        train(run, model, optimizer, first=6 * epoch, last=6 * (epoch + 1))
        run.epoch_end({"accuracy": torch.tensor(0.5)})
        assert method.at_random == (epoch >= 2), epoch
    assert run.figures()["ctre/phase"] == 1.0


def test_channels_of_a_conv_net_need_one_batch_of_data() -> None:
    method = SMCP(budget=0.6, every=4, round_to=1, prune_stem=True, print_plan=False)
    model, loader = conv_net(), data(2, 6, 6)
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"looked at with one sample, .* give sparsify\(..., data=\) one batch"):
        sparsify(method, model, optimizer, STEPS)
    run = sparsify(method, model, optimizer, STEPS, data=[next(iter(loader))])
    train(run, model, optimizer, loader=loader)
    assert run.updates > 0
    assert 0 < run.measured_sparsity()["sparsity/total"] < 1
    assert bool((~run.masks["3.weight"]).transpose(0, 1).flatten(1).all(1).any())  # whole channels are gone


def test_gated_channels_of_a_conv_net_need_one_batch_of_data() -> None:
    model, loader = conv_net(), data(2, 6, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def method() -> ConstrainedL0:
        return ConstrainedL0(density=0.4, unit="channel", gate_lr=0.5, dual_lr=0.5, print_plan=False)

    with pytest.warns(
        UserWarning, match=r"nothing shows whether they take their outputs. Set .* sparsify\(..., data=\)"
    ):
        sparsify(method(), model, optimizer, STEPS)
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = sparsify(method(), model, optimizer, STEPS, data=[next(iter(loader))])
    assert {"0.weight", "0.bias", "1.weight", "1.bias"} <= run.masks.keys()
    train(run, model, optimizer, loader=loader)
    assert run.step == STEPS


def test_forward_says_how_the_network_takes_a_batch() -> None:
    model, loader = net(), [{"inputs": batch[0]} for batch in data()]
    optimizer, seen = sgd(model), []

    def forward(module: nn.Module, batch: Any) -> Any:
        seen.append(batch)
        return module(batch["inputs"])

    with pytest.raises(ValueError, match=r"Sequential\.forward failed on a batch of the training data"):
        sparsify(CTRE(0.8, every=4, print_plan=False), model, optimizer, STEPS, data=loader)
    run = sparsify(CTRE(0.8, every=4, print_plan=False), model, optimizer, STEPS, data=loader, forward=forward)
    train(run, model, optimizer)
    assert run.updates > 0
    assert len(seen) == 1 + run.updates * len(loader)  # one batch at the start, and a pass before each update


def test_random_data_is_reported() -> None:
    class Noisy(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return torch.randn(12), 0

    model = net()
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8)
    with pytest.warns(UserWarning, match="differs each time .* give a loader without augmentation as data="):
        sparsify(CTRE(0.8, every=4, print_plan=False), model, sgd(model), STEPS, data=loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # which layer is called last does not depend on it
        made = net()
        sparsify(SET(0.8, neuron_importance=0.2, print_plan=False), made, sgd(made), 1000, data=loader, forward=first)


def first(module: nn.Module, batch: Any) -> Any:
    return module(batch[0])


# ---------------------------------------------------------------------- what a reader of runs found


def test_a_state_of_another_method_or_of_something_else_is_refused() -> None:
    model = net()
    saved = begin("rigl", model, sgd(model)).state_dict()
    for state, words in (
        (saved, "was written by RigL, and this is SET"),
        ({"a": 1}, "is not a state of SET: it has the keys a"),
        (model.state_dict(), "is not a state of SET: it has the keys 0.weight"),
    ):
        other = net()
        with pytest.raises(ValueError, match=words):
            begin("set", other, sgd(other), state=state)


def test_a_run_that_is_not_closed_goes_with_its_optimizer() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("static", model, optimizer)
    train(run, model, optimizer, 0, 2)
    alive = [weakref.ref(thing) for thing in (run, model, optimizer)]
    del run, model, optimizer
    gc.collect()
    assert [thing() for thing in alive] == [None, None, None]


def test_a_run_is_not_copied() -> None:
    model = net()
    run = begin("static", model, sgd(model))
    with pytest.raises(TypeError, match=r"a run cannot be copied or pickled.*Keep run.state_dict"):
        copy.deepcopy(run)


class GrowLate(SET):
    """Reads the dense gradient in `after_step`, where it may be masked."""

    def grow_scores(self, step: Step, name: str) -> Tensor | None:
        return step.gradient(name)


@pytest.mark.parametrize("clip", [None, lambda parameters: None])
def test_a_dense_gradient_that_is_gone_is_refused_in_words(clip: Any) -> None:
    model = net()
    optimizer = sgd(model)
    run = begin(GrowLate(0.5, every=2, print_plan=False), model, optimizer, clip=clip)
    with pytest.raises(RuntimeError, match=r"the dense gradient of 0.weight is gone.*Read it in before_step"):
        train(run, model, optimizer)
