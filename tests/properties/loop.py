"""Trains a random run in a hand-written loop."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from support.methods import CONTRACTS

from properties.cases import Case
from properties.checks import Watch, assert_left_as_it_was, assert_no_hooks, facts, is_documented_refusal, same_values
from properties.setup import (
    CLIP,
    Data,
    Refused,
    autocast,
    built,
    ends_window,
    loss_factor,
    loss_of,
    make_optimizers,
    method_of,
    micro_batches,
)
from sparse_callbacks import SparseRun, methods, sparsify
from sparse_callbacks.core.hooks import Hooks


class Loop:
    """A network, its optimizers and a GradScaler, new or from a file."""

    def __init__(self, case: Case, saved: Any) -> None:
        self.case, self.net, self.done = case, built(case), 0
        self.optimizers = make_optimizers(case, self.net.named_parameters())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=case.precision == "16-mixed")
        if saved:
            self.done = saved["done"]
            self.net.load_state_dict(saved["net"])
            self.scaler.load_state_dict(saved["scaler"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    def sparse(self, saved: Any) -> SparseRun:
        """Begin the sparse run."""
        case = self.case
        return sparsify(
            method_of(case, self.net, getattr(methods, CONTRACTS[case.method].callback_class.__name__)),
            self.net,
            self.optimizers,
            case.steps,
            epoch=case.epoch_steps,
            data=Data(case),
            clip=CLIP.get(case.clip),
            on_restart=lambda: None,
            state=saved.get("run"),
        )

    def state(self, run: SparseRun) -> dict[str, Any]:
        """Everything that goes on in a resumed run."""
        return {
            "done": self.done,
            "net": self.net.state_dict(),
            "scaler": self.scaler.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "run": run.state_dict(),
        }

    def micro_batch(self, run: SparseRun, batch: Any) -> None:
        """Forward, backward and, at the end of a window, the step; then the end of the epoch."""
        case, index = self.case, self.done % self.case.batches
        # only methods that sample something need to know where micro-batches begin
        around = run.batch() if type(run.method).batch_start is not Hooks.batch_start else nullcontext()
        with around:
            with autocast(case):
                loss = loss_of(self.net, batch, loss_factor(case, self.done)) / case.window
            self.scaler.scale(loss).backward()
        self.done += 1
        if ends_window(case, index):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            self.net.zero_grad()
        if self.done % case.batches == 0:
            run.epoch_end({"val_loss": float(loss.detach())})


def train_in_a_loop(case: Case, folder: Path, resume: int | None) -> tuple[Any, Watch]:
    """Train for two epochs; what the run left, and what watched it. For the arguments see
    :func:`properties.fitting.train_under_a_trainer`; a run is saved after the step that follows its twist."""
    saved = {} if resume is None else torch.load(folder / "loop.pt", weights_only=True)
    loop = Loop(case, saved)
    net = loop.net
    before, weights = facts(net), copy.deepcopy(net.state_dict())
    try:
        run = loop.sparse(saved)
    except Exception as error:
        if resume is None and is_documented_refusal(error, 0):
            assert same_values(weights, net.state_dict()), "a refused run has changed the weights"
            assert_no_hooks(loop.optimizers)
            raise Refused from error
        raise
    watched = Watch(case, run.method, net)
    watched.begin()
    waiting = isinstance(case.twist, int) and resume is None
    for batch in micro_batches(case)[loop.done :]:
        loop.micro_batch(run, batch)
        watched.batch_over(loop.optimizers)
        if waiting and loop.done >= case.twist and ends_window(case, (loop.done - 1) % case.batches):
            torch.save(loop.state(run), folder / "loop.pt")
            waiting = False
    run.close()
    assert_left_as_it_was(before, net)
    assert_no_hooks(loop.optimizers)
    return copy.deepcopy(loop.state(run)), watched
