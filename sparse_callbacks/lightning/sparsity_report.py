"""The callback that keeps the record of a fit, sparse or dense, and writes its page."""

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.record.description import as_json, command, libraries, machine
from sparse_callbacks.core.record.page import PAGE, page_or_warning, why_no_page
from sparse_callbacks.core.record.record_file import refuse_unrecorded
from sparse_callbacks.core.record.recorder import STATE_VERSION, RunRecorder
from sparse_callbacks.core.record.row_times import refuse_interval, steps_between_rows
from sparse_callbacks.core.record.samples import samples_in
from sparse_callbacks.lightning import accumulation, curves
from sparse_callbacks.lightning.callback import peers_of
from sparse_callbacks.lightning.logged_network import log_end
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.step_rates import StepRates, is_rate

if TYPE_CHECKING:
    from pytorch_lightning import Callback as AnyCallback
else:
    from sparse_callbacks.lightning.callback import AnyCallback


class SparsityReport(AnyCallback):
    """Keeps a record of a fit in a folder, and writes its page ``report.html`` when the fit is over.

    The record (``record/run.json``, ``rows.jsonl`` and ``masks.pt``) holds what the network was at each time and what it had
    cost by then: sparsity, FLOPs of inference and training, bytes, topology, and every metric that was logged, by optimizer
    step. It is written by the first process, goes on where a run is resumed, and needs no logger. Loggers of the Trainer get
    its FLOPs, bytes and topology as curves, and W&B and TensorBoard at the end a table of layers, histograms and the figures
    of the page. A dense run, without sparsity callbacks, is recorded in the same way, to compare with. Where the callback
    stands among others does not matter.

    Nothing is recorded of ``fast_dev_run``, of trial runs of tuners, and of ``validate``, ``test`` and ``predict``.

    Args:
        folder: the folder of the run; an earlier record in it is replaced. None: where ModelCheckpoint would make its folder,
            by the first logger, or ``default_root_dir``.
        every: optimizer steps between two rows; at most one update in so many has a row. None: about 200 rows of the run, at
            least ``log_every_n_steps`` of the Trainer apart (50 where it logs nothing).
        dense: the folder of a recorded dense run, which the page compares with.
        title: the headline of the page; default: the method.
        page: whether the page is written at the end. It needs the extra ``report``; a warning says so where it is missing.
        configuration: what the page shows as the configuration; None: the hyperparameters of the module.
        command: what the page says to run it again; None: what was typed.

    Example:
        >>> from sparse_callbacks import RigL, SparsityReport
        >>> callbacks = [RigL(0.9), SparsityReport(title="RigL at 90 %")]
        >>> # pl.Trainer(callbacks=callbacks).fit(module, data)
    """

    @checked
    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every: int | None = None,
        dense: str | Path | None = None,
        title: str = "",
        page: bool = True,
        configuration: Mapping[str, Any] | None = None,
        command: str | None = None,
    ) -> None:
        refuse_interval(every)
        self.every, self.title, self.page = every, title, page
        self.configuration, self.command = configuration, command
        self.given_folder = None if folder is None else Path(folder)
        self.dense = None if dense is None else Path(dense)
        self.folder: Path | None = None
        """The folder of the latest recorded fit; None before one."""
        self._recorder: RunRecorder | None = None
        self._restored: Mapping[str, Any] | None = None
        self._trainer: Trainer = None
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._begun, self._page_wanted, self._epoch, self._batch = False, False, 0.0, 0
        self._trained: list[bool] = []
        self._knows_samples = True
        self._before_validation: dict[str, float] = {}
        self._measured: set[str] = set()  # names of metrics that a validation has logged
        self._told: dict[str, float] = {}  # metrics when the last row was written
        self._rates = StepRates()

    # ------------------------------------------------------------------ Lightning's hooks, in their order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        self._forget_fit()
        if self.dense is not None:
            refuse_unrecorded(self.dense, "dense")
        self.folder = Path(trainer.strategy.broadcast(str(self.given_folder or folder_of(trainer))))
        self._page_wanted = self.page
        if self.page and (text := why_no_page()):
            self._page_wanted = False
            rank_zero_warn(text)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version", 0) > STATE_VERSION:
            raise ValueError(
                f"the checkpoint holds the record of a later version of this package ({state_dict['version']}, and this one "
                f"knows {STATE_VERSION}). Install that version, or resume without SparsityReport."
            )
        self._restored = state_dict or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        assert self.folder is not None
        peers, earlier = peers_of(trainer), self._recorder
        if self._goes_on(trainer, pl_module):
            assert earlier is not None
            self._restored = earlier.state(gather=True)
        if any(peer.fresh_start for peer in peers):
            self._restored = None
        length = accumulation.run_length(trainer)
        every = steps_between_rows(self.every, length, trainer.log_every_n_steps or 50)
        said = self._said(length, pl_module)
        self._trainer, self._module = trainer, pl_module
        self._recorder = RunRecorder(
            self.folder, pl_module, peers, lambda: trainer.optimizers, every, said, rank_zero_warn
        )
        self._recorder.tell = self._log
        for peer in peers:  # a pass over the data may come before the first batch
            peer.engine.record_by(self._recorder)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._recorder is None or self._trainer is None:
            return
        if not self._begun:
            self._begin(trainer, pl_module)
        self._batch = batch_idx
        if batch_idx == 0:
            self._follow_training(pl_module)
        samples = samples_in(batch)
        if samples is None and self._knows_samples:
            self._knows_samples = False
            rank_zero_warn(
                f"no tensor in a batch of type {type(batch).__name__} tells how many samples it holds: the record counts each "
                "batch as one sample."
            )
        self._recorder.add_samples(1 if samples is None else samples)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._recorder is not None
        self._begun = True
        restored, self._restored = self._restored, None
        self._rates.load((restored or {}).get("rates", []), trainer.optimizers)
        epoch = float(trainer.current_epoch)
        self._epoch = epoch
        self._recorder.begin(restored, trainer.global_step, epoch)
        self._trained = _trained(module)
        if self._recorder.is_new:
            self._recorder.measure()

    def _follow_training(self, module: LightningModule) -> None:
        """Other layers may be trained in this epoch than in the one before."""
        assert self._recorder is not None
        if (trained := _trained(module)) != self._trained:
            self._trained = trained
            self._recorder.measure(again=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._recorder is not None:
            self._rates.note(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._catch_up()

    def _catch_up(self) -> None:
        """Close the window of the step that was taken, if nobody has yet: a callback before this one may save a checkpoint."""
        trainer, recorder = self._trainer, self._recorder
        if recorder is None or trainer is None or not self._begun or trainer.global_step == recorder.step:
            return
        batches = trainer.num_training_batches
        done = (self._batch + 1) / batches if batches and not math.isinf(batches) else 0.0
        self._epoch = trainer.current_epoch + done
        recorder.window_over(trainer.global_step, self._epoch, self._new_metrics)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = self._metrics() if self._begun else {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None and self._begun and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._catch_up()
            before = self._before_validation
            self._measured |= {name for name, value in self._metrics().items() if before.get(name) != value}
            self._recorder.validated(self._epoch, self._new_metrics(self._measured))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is not None and self._begun:
            self._catch_up()
            self._recorder.finish("finished", self._epoch, self._metrics())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._begun or not trainer.is_global_zero:
            return
        assert self.folder is not None
        if self._page_wanted:
            page_or_warning(self.folder, self.dense, rank_zero_warn)
        if self.page:  # otherwise somebody else writes it, later, and shows loggers what is known then
            log_end(trainer.loggers, peers_of(trainer), self.folder, curves.step_number(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._recorder is not None and self._begun:
            # Ctrl-C, a signal, or what a callback raises to end a run whose checkpoint resumes it
            stopped = not isinstance(exception, Exception) or type(exception).__name__ == "RunStopped"
            self._recorder.finish("stopped" if stopped else "failed", self._epoch, {})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._recorder is None:
            return
        self._recorder.stop_looking()
        for peer in peers_of(trainer):
            peer.engine.recorder = None
        self._trainer = None
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        self._catch_up()
        if self._recorder is None or not self._begun:
            return dict(self._restored or {})
        rates = {} if self._trainer is None else {"rates": self._rates.state(self._trainer.optimizers)}
        return {**self._recorder.state(gather=self._trainer is not None), **rates}

    # ------------------------------------------------------------------ what a run says

    def add(self, **further: Any) -> None:
        """Add to what the record says once of the run, such as the ``results`` of a test.

        Args:
            **further: parts of :class:`~sparse_callbacks.core.record.record_file.RunRecord` by their names.
        """
        if self._recorder is not None and self.is_recorded:
            self._recorder.say(**further)

    @property
    def is_recorded(self) -> bool:
        """The latest fit has seen a batch, and its record lies in :attr:`folder`."""
        return self._recorder is not None and self._begun

    @property
    def path(self) -> Path | None:
        """The page of the latest recorded fit; None where none was recorded, or its page was not wanted or not written."""
        path = None if self.folder is None else self.folder / PAGE
        return path if path is not None and path.exists() else None

    def _said(self, length: float, module: LightningModule) -> dict[str, Any]:
        given = self.configuration if self.configuration is not None else getattr(module, "hparams_initial", {})
        return {
            "libraries": libraries(("pytorch-lightning", "lightning")),
            "machine": machine(module.device),
            "length": None if math.isinf(length) else int(length),
            "configuration": as_json(given),
            "command": command() if self.command is None else self.command,
            "title": self.title,
        }

    def _metrics(self) -> dict[str, float]:
        return self._rates.in_place_of(curves.logged_metrics(self._trainer), self._trainer)

    def _new_metrics(self, always: Collection[str] = ()) -> dict[str, float]:
        """Metrics that have changed since the last row: the others would be told again as if they were new.

        Args:
            always: names of those that were measured just now, whatever they came to.
        """
        metrics, before = self._metrics(), self._told
        self._told = metrics
        return {n: v for n, v in metrics.items() if n in always or before.get(n) != v or is_rate(n)}

    def _log(self, row: Mapping[str, Any]) -> None:
        if self._trainer is not None:
            curves.log_recorded(self._trainer, row)

    def _goes_on(self, trainer: Trainer, module: LightningModule) -> bool:
        """A second fit of the same Trainer goes on where the first one ended."""
        earlier = self._recorder
        same = self._restored is None and earlier is not None and getattr(self, "_module", None) is module
        return same and earlier is not None and 0 < earlier.step == trainer.global_step

    def __getstate__(self) -> dict[str, Any]:
        # for a process that is started, or a copy: neither belongs to a run
        return {**vars(self), "_recorder": None, "_trainer": None, "_module": None}


def folder_of(trainer: Trainer) -> str:
    """The folder of a run, as ModelCheckpoint chooses it: by the first logger, or ``default_root_dir``."""
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def _trained(module: LightningModule) -> list[bool]:
    return [p.requires_grad for p in module.parameters()]
