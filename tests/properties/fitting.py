"""Trains a random run under a Trainer."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from support.methods import CONTRACTS

from properties.cases import EPOCHS, Case
from properties.checks import Watch, assert_left_as_it_was, assert_no_hooks, facts, is_documented_refusal, same_values
from properties.setup import CLIP, Data, Refused, built, ends_window, loss_factor, loss_of, make_optimizers, method_of
from sparse_callbacks.testing.comparison import snapshot
from sparse_callbacks.testing.runs import Stops, trainer_for, watch


class Task(pl.LightningModule):
    """Trains the network of a run."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        # in the precision of the run already: Lightning loads a checkpoint before it converts, and would round float64
        self.net, self.case, self.seen = built(case), case, 0
        self.automatic_optimization = not case.manual

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        number = self.trainer.current_epoch * self.case.batches + batch_idx
        self.seen += 1
        loss = loss_of(self.net, batch, loss_factor(self.case, number))
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.case.window)
        if ends_window(self.case, batch_idx):
            self._step_by_hand()
        return None

    def _step_by_hand(self) -> None:
        used, schedules = self.optimizers(), self.lr_schedulers()
        for optimizer in used if isinstance(used, list) else [used]:
            if self.case.clip and self.case.precision != "16-mixed":  # gradients are still scaled there
                CLIP[self.case.clip]([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
        self.zero_grad()
        for schedule in schedules if isinstance(schedules, list) else [schedules] if schedules else []:
            schedule.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.net, batch))

    def configure_optimizers(self) -> Any:
        made = make_optimizers(self.case, self.net.named_parameters())
        if not self.case.schedule:
            return made
        curves = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.97**step) for o in made]
        return made, [{"scheduler": s, "interval": "step"} for s in curves]


def train_under_a_trainer(case: Case, folder: Path, resume: int | None) -> tuple[Any, Watch]:
    """Fit for two epochs; what the run left, and what watched it.

    Args:
        case: the run.
        folder: of the checkpoint that the first run writes, at the micro-batch of its twist.
        resume: the micro-batch whose checkpoint the run goes on from; None for a new run.
    """
    task = Task(case)
    before, weights = facts(task.net), copy.deepcopy(task.net.state_dict())
    try:
        callback = method_of(case, task, CONTRACTS[case.method].callback_class)
        watched = Watch(case, callback, task)
        trainer = _trainer(case, callback, watched, Stops(folder, (case.twist,) if isinstance(case.twist, int) else ()))
        validation = Data(replace(case, batches=1)) if "monitor" in case.arguments else None
        path = None if resume is None else folder / f"{resume}.ckpt"
        trainer.fit(task, Data(case), validation, ckpt_path=path)
    except Exception as error:
        if resume is None and is_documented_refusal(error, task.seen):
            assert same_values(weights, task.net.state_dict()), "a refused run has changed the weights"
            raise Refused from error
        raise
    assert task.seen == EPOCHS * case.batches - (resume or 0)
    assert_left_as_it_was(before, task.net)
    assert_no_hooks(trainer.optimizers)
    return snapshot(trainer, task, callback), watched


def _trainer(case: Case, callback: Any, watched: Watch, stops: Stops) -> pl.Trainer:
    options: dict[str, Any] = {"max_epochs": EPOCHS, "precision": case.precision}
    if case.precision == "16-mixed":  # Lightning would take bfloat16 on the CPU
        del options["precision"]
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    if not case.manual:
        options |= {"accumulate_grad_batches": case.window}
        options |= {"norm": {"gradient_clip_val": 0.3}, "value": {"gradient_clip_val": 0.05}}.get(case.clip, {})
        options |= {"gradient_clip_algorithm": case.clip} if case.clip else {}
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: watched.begin())
    see = watch(lambda trainer, *_: watched.batch_over(trainer.optimizers))
    return trainer_for([callback, begin, see, stops], num_sanity_val_steps=0, **options)
