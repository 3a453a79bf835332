"""The recorder of a run: told of batches and steps, it keeps the account and writes rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core import distributed
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.account import Account
from sparse_callbacks.core.record.description import described, now
from sparse_callbacks.core.record.kept_masks import kept_masks
from sparse_callbacks.core.record.known_uses import KnownUses
from sparse_callbacks.core.record.row_figures import (
    Snapshot,
    inference_figures,
    numbers_of,
    snapshot,
    with_paths,
    without_dead_units,
)
from sparse_callbacks.core.record.row_file import RowFile
from sparse_callbacks.core.record.samples import samples_in
from sparse_callbacks.core.record.topology_statistics import TopologyHistory
from sparse_callbacks.core.record.window_costs import WindowCosts
from sparse_callbacks.core.selection import entries
from sparse_callbacks.core.step import MeasuresSimilarity, Step

STATE_VERSION = 1
SMALL_CHAIN = 1 << 18  # sparse weights of a chain whose paths are followed at each update, and not at validations alone


class RunRecorder:
    """Keeps the record of one run: what the network was at each time, and what it had cost by then.

    The engine calls :meth:`step_taken` and :meth:`passed`, the host the rest. Every process of a run has a recorder and calls
    it alike; the first one writes.

    Args:
        folder: the folder of the run.
        model: the model.
        methods: its methods; none for a dense run.
        optimizers: a function that gives its optimizers, which some methods start anew.
        every: optimizer steps between two rows; at most one update in so many has a row.
        said: further fields of RunRecord, known before the run.
        warn: warns the user.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        methods: Sequence[Method],
        optimizers: Callable[[], Sequence[Optimizer]],
        every: int,
        said: Mapping[str, Any],
        warn: Callable[[str], object],
    ) -> None:
        self.file = RowFile(folder, warn)
        self.step = 0
        """Optimizer steps of the run so far, as the host numbers them."""
        self.said: dict[str, Any] = {"started": now(), **said}
        """Fields of RunRecord that are known besides the methods and layers."""
        self.tell: Callable[[Mapping[str, Any]], object] = lambda row: None
        """Receives each row, on every process, when it has been added: for loggers of the host."""
        self._model, self._methods, self._optimizers, self._every = model, list(methods), optimizers, every
        self._account, self._costs = Account(), WindowCosts(methods)
        self._history = TopologyHistory(model)
        self._known = KnownUses(model, self._methods)
        self._first_masks: dict[str, Tensor] = {}
        self._start: Snapshot | None = None  # of a new run, until its first batch has shown what it costs
        self._samples = 0  # of the window that is open
        self._began, self._seconds, self._began_epoch = time.perf_counter(), 0.0, 0.0
        self._sparse_active = self._others = 0
        self._masks_seen: object = None
        self._masks_looked: object = None
        self._last_row = self._last_look = 0

    # ------------------------------------------------------------------ the run begins

    def begin(self, state: Mapping[str, Any] | None = None, step: int = 0, epoch: float = 0.0) -> None:
        """Training begins, before its first batch; :meth:`measure` comes next where :attr:`is_new`.

        Args:
            state: that of the run that is resumed, if it was recorded.
            step, epoch: where a run goes on that was not.
        """
        self._began_epoch = epoch
        if state is not None:
            self._go_on(state)
            return
        self.file.begin()
        self.step = step
        self._start = self._snapshot(look=True)
        self._count_active()

    @property
    def is_new(self) -> bool:
        """Nobody knows yet where each weight is used."""
        return not self._known.of

    def measure(self, again: bool = False, **options: Any) -> None:
        """Look in the coming batch where each weight is used.

        Args:
            again: whether that counts from then on where it is known already: other layers are trained.
            options: those of FirstBatch.
        """
        self._known.measure(again, **options)

    @property
    def measures(self) -> bool:
        """The coming batch shows where each weight is used."""
        return self._known.measures

    def _end_first_batch(self) -> None:
        """The first window is over, and its cost known from here on."""
        if not self._known.end_batch(self._samples):
            return
        self._price()
        if self._start is not None:
            self._follow_first_paths(self._known.chain.names)
            started, self._start = self._start, None
            if self._known.chain.names and not started.has_paths:
                started = without_dead_units(started)
            self.said["batch"] = distributed.sums_of([self._samples])[0]
            self._first_masks = kept_masks(self._methods, self._known.order)
            self._keep_masks()
            self.say()
            self._add("start", self._last_look, self._began_epoch, {}, started)

    def _follow_first_paths(self, chain: Sequence[str]) -> None:
        """Add the figures of paths to the snapshot of the start, if the masks are still those of the start."""
        if self._start is not None and not self._start.has_paths and self._masks_looked == self._changes():
            self._start = with_paths(self._start, self._model, self._methods, chain)

    def _price(self) -> None:
        listed = self._methods[0].entries if self._methods else entries(self._model)
        sizes = {entry.name: entry.size for entry in listed}
        sparse = {name for method in self._methods for name in method.params}
        self._others = sum(size for name, size in sizes.items() if name not in sparse)
        self._costs.set_uses(self._known.of, sizes)

    # ------------------------------------------------------------------ training goes on

    def step_taken(self, method: Method, step: Step) -> None:
        """An optimizer has stepped, or an update has replaced its step; masks are still those of the step."""
        self._costs.note(method, step)
        if self._start is not None:  # the update that may follow at once leaves no first masks to follow paths in
            self._follow_first_paths(self._known.chain_shown().names)

    def passed(self, method: Method, batch: Any, passes: int = 1) -> None:
        """A batch has passed through the network without training, for ``method`` to look at.

        Args:
            method: the method.
            batch: the batch.
            passes: what was computed, in forward passes.
        """
        samples = passes * (samples_in(batch) or 0)
        forward = self._costs.forward(self._active_counts())
        similarities = self._costs.similarities(method) if isinstance(method, MeasuresSimilarity) else 0
        self._account.charge_pass(samples, forward, similarities)

    def add_samples(self, samples: int) -> None:
        """Training has seen so many samples in this process."""
        self._samples += samples

    def window_over(self, step: int, epoch: float, metrics: Callable[[], Mapping[str, Any]]) -> None:
        """The window of an optimizer step is over.

        Args:
            step: optimizer steps of the run so far.
            epoch: epochs done.
            metrics: gives the latest of everything logged, where a row is written.
        """
        self._end_first_batch()
        self._charge()
        self.step = step
        changes = self._changes()
        if changes != self._masks_seen and not any(m.weights.has_gates for m in self._methods):
            self._count_active()  # gates move in every step, and are counted where a row is written
        if changes != self._masks_looked and step - self._last_look >= self._every:
            self._add("update", step, epoch, metrics())
        elif step % self._every == 0 and step != self._last_row:
            self._add("log", step, epoch, metrics())

    def skipped(self) -> None:
        """A GradScaler has skipped the step of the window: forward and backward have cost what they cost."""
        if not self.measures:
            self._charge()

    def _charge(self) -> None:
        if self._samples or self._costs.noted:
            self._account.charge(self._samples, self._costs.window(), self._sparse_active + self._others)
            self._samples = 0

    def validated(self, epoch: float, metrics: Mapping[str, Any]) -> None:
        """A validation is over."""
        if not self.measures:  # before any step there is nothing to say
            self._add("validation", self.step, epoch, metrics)

    def finish(self, status: str, epoch: float, metrics: Mapping[str, Any]) -> None:
        """Training is over; ``status`` is one of ``record_file.STATUSES``. After an error no other process is asked."""
        self.stop_looking()
        self.said["status"] = status
        if status == "finished" and not self._start:
            self._charge()
            self._add("end", self.step, epoch, metrics)
            self._keep_masks()
            self.say()
            return
        with suppress(Exception):  # what has ended the run is what the user must see
            self._keep_masks()
            self.say()

    def stop_looking(self) -> None:
        """No batch will show where weights are used."""
        self._known.stop()

    def warned(self, text: str) -> None:
        """The user was warned of something: the page shows it too."""
        earlier = self.said.get("warnings", [])
        if text not in earlier:
            self.said["warnings"] = [*earlier, text]

    # ------------------------------------------------------------------ what is written

    def say(self, **further: Any) -> None:
        """Write what is said once, with further fields of RunRecord."""
        self.said |= further
        chain = {"chain": self._known.chain.names, "chain_reason": self._known.chain.reason}
        if distributed.rank() == 0:
            self.file.say(described(self._model, self._methods, self._known.of, **chain, **self.said))

    def _keep_masks(self) -> None:
        if self._first_masks and distributed.rank() == 0:
            self.file.keep_masks(self._first_masks, kept_masks(self._methods, self._known.order))

    def _add(
        self, event: str, step: int, epoch: float, metrics: Mapping[str, Any], found: Snapshot | None = None
    ) -> None:
        """A row. Every process comes here: amounts are added up over all of them."""
        account = self._account
        account.gather()
        found = (
            self._snapshot(look=event != "log", paths=event != "update" or self._follows_paths)
            if found is None
            else found
        )
        row: dict[str, Any] = {"step": step, "epoch": epoch, "samples": 0, "seconds": self._time(), "event": event}
        row |= numbers_of(metrics) | dict(found.figures) | inference_figures(self._costs.forward(found.active))
        self._sparse_active = sum(found.active.values())
        active = self._sparse_active + self._others
        row |= account.figures() | {
            "active/mean": account.active_sum / account.steps if account.steps else float(active)
        }
        if event != "log":
            row |= {**found.topology, "layers": dict(found.layers)}
        self.file.add([row], at_once=event not in ("log", "update"))
        self._last_row = step
        self.tell(row)

    @property
    def _follows_paths(self) -> bool:
        """Paths are followed wherever somebody looks at the masks: it takes twice as long as all else."""
        return sum(m.weights.size(name) for m in self._methods for name in m.params) <= SMALL_CHAIN

    def _snapshot(self, look: bool, paths: bool = True) -> Snapshot:
        # the first process writes; the others need no history
        history = self._history if look and distributed.rank() == 0 else None
        if look:
            self._last_look, self._masks_looked = self.step, self._changes()
        found = snapshot(self._model, self._methods, self._optimizers(), history, self.step)
        if paths:
            return with_paths(found, self._model, self._methods, self._known.chain.names)
        return without_dead_units(found) if self._known.chain.names else found

    def _time(self) -> float:
        return self._seconds + time.perf_counter() - self._began

    def _changes(self) -> object:
        """What differs where masks have moved."""
        return [(id(m.weights), m.weights.changes, m.updates) for m in self._methods]

    def _active_counts(self) -> dict[str, int]:
        return {name: count for method in self._methods for name, count in method.weights.active_counts.items()}

    def _count_active(self) -> None:
        self._masks_seen = self._changes()
        self._sparse_active = sum(self._active_counts().values())

    # ------------------------------------------------------------------ state

    def state(self, gather: bool) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts and tensors.

        Args:
            gather: whether every process comes here, so that what all have done can be added up.
        """
        if gather:
            self._account.gather()
        self.file.flush()
        return {
            "version": STATE_VERSION,
            "folder": str(self.file.folder),
            "said": {key: self.said[key] for key in ("started", "batch", "warnings") if key in self.said},
            "step": self.step,
            "rows": self.file.written,
            "last_row": self._last_row,
            "last_look": self._last_look,
            "moved": self._changes() != self._masks_looked,
            "seconds": self._time(),
            "samples": self._samples,
            "account": self._account.state(),
            **self._known.state(),
            "history": self._history.state(),
        }

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self.step, self._last_row, self._last_look = state["step"], state["last_row"], state["last_look"]
        self._seconds, self._samples = state["seconds"], state["samples"]
        given = self.said.pop("warnings", [])  # while the run was set up again
        self.said |= state["said"]
        for text in given:
            self.warned(text)
        self._account.load(state["account"])
        self._known.load(state)
        self._history.load(state["history"])
        self._first_masks = self.file.go_on(Path(state["folder"]), self.said["started"], self.step, state["rows"])
        self._price()
        self._count_active()
        self._masks_looked = None if state["moved"] else self._masks_seen
        self.said["status"] = "running"
        self.say()
