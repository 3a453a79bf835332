"""The engine that every method is made of: masks, calendar, counters. It knows torch, and nothing of a Trainer."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_callbacks.core import distributed, optimizers
from sparse_callbacks.core.calendar import Calendar, Progress
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.ops import random_mask, zeros_for
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.weights import MaskStore

ROOTS_EVERY = 100  # steps between two calls of optimizers.lift_roots: what it writes decays


def _no_model() -> None:
    return None


class Engine:
    """Keeps the one invariant: between optimizer steps every sparse parameter holds ``mask * dense``.

    A method overrides at most :meth:`attach`, :meth:`initial_masks`, :meth:`before_step`, :meth:`after_step` and
    :meth:`new_masks`, and reads ``params``, ``masks``, ``names``, ``step``. The host calls :meth:`begin`,
    :meth:`before_optimizer_step` at every optimizer step once its gradients are complete, and :meth:`end`.
    """

    anchor: ClassVar[int] = 1
    """The earliest step of an update: 0 where the calendar is asked before a step, with the steps taken so far."""
    keeps_dense: ClassVar[bool] = False
    """Pruned weights go on to learn: a dense copy takes the steps, with gradients that are not masked."""
    reads_dense_gradients: ClassVar[bool] = True
    """False: the gradients of pruned weights may be anything, also NaN."""
    steps_are_announced: bool = True
    """The host announces every step that it knows of; others, such as a tuner's, are only kept masked. False: it must."""
    plans_counts: ClassVar[bool] = True
    """At the end there are as many zeros as planned; False: gates or a budget decide."""
    curves: ClassVar[str] = ""
    """What the method's own figures are logged under; by default its name."""
    takes_turns: ClassVar[bool] = False
    """Several networks train in turn, or one on each rank, and become one now and then."""
    explores: ClassVar[bool] = False
    """True where connections come and go, so that the share of weights that were ever active is worth knowing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.aux: dict[str, Tensor] = {}
        """Tensors of the method that must survive a resume."""
        self.updates = 0
        """Topology updates done."""
        self.calendar: Calendar | None = None
        self.events: dict[str, float] = {}
        """Figures of the latest update, until the host logs them."""
        self.store = MaskStore({}, {}, {})
        self.batch = 0
        """Number of the batch at hand in its epoch."""
        self.epoch_over = False
        """It is the last."""
        self.run_over = False
        """It is the last of the run."""
        self.skipped = 0
        """Announced steps of this fit that were not taken, by a GradScaler's choice."""
        self.resumed = False
        """This fit goes on from a checkpoint."""
        self.restart_wanted = False
        """The optimizers and their schedules shall be configured anew before the next batch that opens a window."""
        self._targets: dict[str, float] = {}
        self.progress = Progress(self.anchor)
        self._model: Callable[[], nn.Module | None] = _no_model
        self._unbind()

    def _unbind(self) -> None:
        self._ownership = Ownership([], {})
        self._handles: list[RemovableHandle] = []
        self._ticks: dict[int, int] = {}
        self._concluded: dict[int, int] = {}
        self._missed: set[tuple[int, int]] = set()
        self._at: int | None = None
        self._tick = -1
        self.replacing = False
        """The step at hand is replaced by an update."""
        self._finite: Tensor | bool = True
        self._gradients = DenseGradients({})
        self._gradients_read: list[bool] = []
        self._gradients_masked = False

    # ------------------------------------------------------------------ what a method overrides

    def attach(self, model: nn.Module) -> None:
        """Look at the model once, when masks exist and before the first batch."""

    def initial_masks(self) -> dict[str, Tensor]:
        """Masks at the start of training: by default random positions, exactly the planned count in each layer."""
        return {name: self.store.by_layer(name, self._random_mask, p.detach()) for name, p in self.params.items()}

    def before_step(self) -> None:
        """Gradients are dense, reduced and unscaled, and not yet clipped. Edit them, or :meth:`skip_step`; keep no memory here."""
        self.mask_gradients()

    def after_step(self) -> None:
        """A step was really taken and counted. Whatever has memory moves here."""

    def rehearse(self) -> None:
        """Fail now where the run would fail later: nothing was written yet."""

    def begin_training(self, epoch: int) -> None:
        """Everything is restored and the masks are written; ``epoch`` (from 0) of the fit begins, or goes on."""

    def batch_start(self) -> None:
        """Any batch begins, also inside an accumulation window; after :meth:`before_batch` where there is one."""

    def before_batch(self) -> None:
        """A batch begins that opens an accumulation window: the weights are those of the coming step."""

    def after_batch(self) -> None:
        """A batch is over, and with it the update that it may have brought."""

    def epoch_start(self, epoch: int) -> None:
        """Epoch ``epoch`` (from 0) of the fit begins, before its first batch is drawn."""

    def sanity_end(self, metrics: Mapping[str, float]) -> None:
        """The host has tried its validation before training, with these ``metrics``."""

    def validation_end(self, metrics: Mapping[str, float], epoch: int) -> None:
        """A validation in ``epoch`` is over; checkpoints may be written next."""

    def epoch_end(self, metrics: Mapping[str, float], epoch: int) -> None:
        """``epoch`` is over, its validation included; ``metrics`` are the latest of everything logged."""

    def wants_dense_gradients(self) -> bool:
        """The coming step needs gradients of pruned weights (asked in manual optimization, where they are masked early)."""
        return False

    def update(self) -> None:
        """Move the masks: :meth:`move_masks` with the figures worth logging."""
        self.move_masks()

    def new_masks(self) -> dict[str, Tensor]:
        """Masks of ``self.names`` after an update."""
        return {name: self.store.bools[name] for name in self.names}

    def new_weights(self, name: str) -> Tensor | None:
        """Values for grown weights of a parameter, of its shape; None: they start from zero."""
        return None

    # ------------------------------------------------------------------ what a method reads

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool mask by parameter name, True where a connection is active; shape of the parameter."""
        return dict(self.store.bools)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The sparse parameters by name."""
        return self.store.params

    @property
    def names(self) -> Sequence[str]:
        """Sparse parameters of the optimizer at hand; outside a step, all of them."""
        return list(self.params) if self._at is None else self._ownership.owns[self._at]

    @property
    def step(self) -> int:
        """Gradient steps taken by the optimizer at hand; outside a step, the most of any. A replaced step does not count."""
        return self.progress.most() if self._at is None else self.progress.counts[self._at].read()

    @property
    def times(self) -> Calendar:
        """The calendar of this run, in optimizer steps."""
        if self.calendar is None:
            raise RuntimeError(f"{type(self).__name__} has no calendar: it is made when fit starts.")
        return self.calendar

    def due(self) -> bool:
        """An update is due now, and the gradient at hand is finite."""
        assert self._at is not None
        return self.progress.due(self._at, self.times) and self.finite

    def may_be_due(self) -> bool:
        """False where no update can be due at the optimizer at hand, found without asking its device."""
        return self._at is not None and self.progress.may_be_due(self._at)

    @property
    def finite(self) -> bool:
        """No gradient of a sparse weight holds inf or NaN in this step. Waits for the device."""
        return bool(self._finite)

    def gradient(self, name: str) -> Tensor | None:
        """Dense gradient of a sparse parameter in this step, also where an update has taken it away from the optimizer."""
        assert self._at is not None
        return self._gradients.of(name, self._ownership.optimizers[self._at], self._tick)

    # ------------------------------------------------------------------ what a method calls

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, unless nobody reads them before the step: then masking the weights suffices.

        Parameters with a dense copy keep theirs.
        """
        finite = self._finite is True
        if self._at is None or self._gradients_read[self._at] or self._finite is False:  # momentum would keep an inf
            for name in (n for n in self.names if not self.store.hides(n)):
                self._gradients_masked = True
                self.store.mask_gradient(name, finite)

    def skip_step(self) -> None:
        """Replace this step by an update of the masks: no parameter of the optimizer moves, nor does its state.

        The host calls :meth:`withhold` as late as it can, so that others who read gradients before the step still find them.
        """
        self.replacing = True

    def move_masks(self, **events: float) -> None:
        """Take :meth:`new_masks`, clear the optimizer state of grown weights, and keep ``events`` for the log."""
        new = self.new_masks()
        distributed.agree(new.values())
        changed = total = 0
        born_in: dict[str, Tensor] = {}
        for name, mask in new.items():
            before, grown = self.store.active[name], mask & ~self.store.bools[name]
            self.store.set(name, mask)
            born, active = int(grown.count_nonzero()), self.store.active[name]
            if born and not self.store.hides(name):
                self._ownership.clear(name, grown)
                born_in[name] = grown
            changed += before + 2 * born - active
            total += before + active
        self.store.apply(new)
        for name, grown in born_in.items():
            if (values := self.new_weights(name)) is not None:
                self.store.fill(name, grown, values)
        assert self._at is not None
        self.progress.mark_done(self._at)
        self.updates += 1
        self.events |= {f"update/{k}": v for k, v in events.items()} | {"update/changed": changed / max(1, total)}
        if self.explores:
            self._note_active(new)
            ever = sum(int(self.aux[f"ever_active/{n}"].count_nonzero()) for n in self.params)
            self.events["update/ever_active"] = ever / self.store.total

    def note(self, **figures: float) -> None:
        """Keep figures of the method for the log, as ``<method>/<figure>``."""
        self.events |= {f"{self.curves or type(self).__name__.lower()}/{k}": v for k, v in figures.items()}

    def _note_active(self, names: Iterable[str]) -> None:
        for name in names:
            mask = self.store.bools[name]
            ever = self.aux.get(f"ever_active/{name}", mask).to(mask.device)
            self.aux[f"ever_active/{name}"] = ever | mask

    def full(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Masks of ``names`` that leave every weight active."""
        return {n: torch.ones_like(self.params[n], dtype=torch.bool) for n in names}

    def generator(self, name: str, step: int) -> torch.Generator:
        """Random numbers that derive from (seed, step, name): the same on every rank, device and resume."""
        digest = hashlib.blake2b(f"{self.seed}/{step}/{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def planned_zeros(self, layer: str, size: int) -> int:
        """Zeros of a layer of ``size`` weights at the target."""
        return zeros_for(self._targets[layer], size)

    def _random_mask(self, layer: str, weight: Tensor) -> Tensor:
        active = weight.numel() - self.planned_zeros(layer, weight.numel())
        return random_mask(weight.shape, active, self.generator(layer, 0)).to(weight.device)

    # ------------------------------------------------------------------ what the host calls

    def begin(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        targets: Mapping[str, float],
        optimizers: Sequence[Optimizer],
        gradients_read: Sequence[bool],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Take hold of the sparse parameters. No value changes before :meth:`apply_masks`.

        Args:
            model: whose ``named_parameters`` the masks go by.
            entries: all parameters; those without a reason become sparse.
            targets: planned sparsity of every layer.
            optimizers: of the run.
            gradients_read: for each optimizer, whether anybody reads gradients between backward and its step.
            state: of a checkpoint; without one, masks of the last run with the same model go on, and otherwise initial ones are made.
        """
        self.resumed, self.skipped = state is not None, 0
        parameters = dict(model.named_parameters())
        sparse = {e.name: e for e in entries if not e.reason}
        params = {name: parameters[name] for name in sparse}
        kept = {n: m for n, m in self.masks.items() if n in params and m.shape == params[n].shape} if self._model() is model else {}
        dense = {n: self.store.dense(n) for n in self.store.hidden if n in kept}
        if state is None:
            refuse_foreign_weights(kept, params)
        else:
            dense = state.get("dense", {})
        self._targets = dict(targets)
        old = set(self.params)
        self._ownership = Ownership(optimizers, params)
        self.store = MaskStore(params, sparse, {})  # initial masks are made from the parameters
        if state is not None:
            masks: Mapping[str, Tensor] = self._load(state)
        elif kept:  # layers that were added since the last run start like in a first one
            gone = (self.params.keys() | old) - kept.keys()
            self.aux = {k: t for k, t in self.aux.items() if k.partition("/")[2] not in gone}
            masks = kept if len(kept) == len(params) else {**self.initial_masks(), **kept}
        else:
            self.forget()
            masks = self.initial_masks()
        self.progress.begin(len(optimizers))
        self.store = MaskStore(params, sparse, masks)
        if self.keeps_dense:
            fresh = params.keys() - kept.keys() if state is None else set()
            self.store.keep_dense({n: dense.get(n, p.detach()) for n, p in params.items() if n in dense or n in fresh})
        if self.explores:
            self._note_active(params)
        self._model = ref(model)
        self.rebind(optimizers, gradients_read)

    def forget(self) -> None:
        """Start anew: no masks, no counters, no state of the method."""
        self.aux, self.updates, self.progress, self.events, self.calendar = {}, 0, Progress(self.anchor), {}, None
        self.store = MaskStore(self.params, self.store.entries, {})
        self._model = _no_model

    def _bind(self, found: Sequence[Optimizer]) -> None:
        self.end()
        self._gradients = DenseGradients(self.params)
        self._ownership = Ownership(found, self.params)
        self._handles = [o.register_step_post_hook(self._after_optimizer_step) for o in found]

    @contextmanager
    def _step_of(self, optimizer: Optimizer, tick: int) -> Iterator[int]:
        self._at, self._tick = self._ownership.index(optimizer), tick
        try:
            yield self._at
        finally:
            self._at = None

    def before_optimizer_step(self, optimizer: Optimizer, tick: int) -> None:
        """Gradients are ready. ``tick`` numbers the optimizer steps of the run, replaced and skipped ones included."""
        with self._step_of(optimizer, tick) as index:
            if self._ticks.get(index) == tick:
                raise ValueError(optimizers.several_closures(type(optimizer).__name__))
            self._ticks[index] = tick
            self.replacing = self._gradients_masked = False
            if self._ownership.owns[index]:
                self._finite = self._all_finite()
                if self._finite is not True and not self.reads_dense_gradients:
                    for name in self.names:
                        self.store.mask_gradient(name, finite=False)
                    self._finite = self._all_finite()
                self.before_step()
            if not self.replacing:
                self.store.bring(self._ownership.steps[index])

    def _all_finite(self) -> Tensor | bool:
        return optimizers.all_finite([g for n in self.names if (g := self.gradient(n)) is not None])

    def after_backward(self, scale: float = 1.0) -> None:
        """Manual optimization: mask the gradients now, before the user clips them, and keep dense ones where a step needs them.

        Args:
            scale: by which a GradScaler has multiplied the gradients.
        """
        for index in range(len(self._ownership.optimizers)):
            self._at = index
            dense_wanted = self.wants_dense_gradients()
            self._at = None
            for name in (n for n in self._ownership.owns[index] if not self.store.hides(n)):
                if dense_wanted:
                    self._gradients.keep_and_mask(name, self.store, scale)
                else:
                    self.store.mask_gradient(name)

    def _after_optimizer_step(self, optimizer: Optimizer, *_: object) -> None:
        """The optimizer's own post hook: it fires when a step was really taken, and not where a GradScaler skipped it."""
        index = self._ownership.index(optimizer)
        if index not in self._ticks and not self.steps_are_announced:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called past the host, so {type(self).__name__} saw no gradients. In manual "
                "optimization step through self.optimizers(), not through the raw torch optimizer."
            )
        tick = self._ticks.get(index, -1)
        with self._step_of(optimizer, tick):
            self.store.absorb(self._ownership.steps[index])  # of a step that nobody announced
            self.apply_masks(index)  # before an update too: a weight that it grows must start at zero
            # a subclass that calls its parent's step fires the hooks of both
            if self._ownership.owns[index] and self._concluded.get(index, -1) != tick:
                self._concluded[index] = tick
                if self.replacing:
                    self.update()
                elif not self._gradients.withheld(optimizer, self._tick):  # else another callback replaced the step
                    self.progress.counts[index].add(self._finite)
                    self.after_step()
                    if self._gradients_masked and self.progress.counts[index].at_most() % ROOTS_EVERY == 1:
                        for name in self._ownership.owns[index]:
                            optimizers.lift_roots(optimizer, self.params[name], ~self.store.bools[name])
                self.replacing = False
                self._gradients.forget(self._ownership.owns[index])

    def apply_masks(self, index: int | None = None) -> None:
        """Restore the invariant in all sparse parameters, or in those that the optimizer ``index`` steps."""
        self.store.apply(self.params if index is None else self._ownership.steps[index], self._finite is True)

    def withhold(self, optimizer: Optimizer) -> None:
        """Leave ``optimizer`` without gradients for the step that an update replaces."""
        self._gradients.take_away(optimizer, self._ticks[self._ownership.index(optimizer)])

    def release(self) -> None:
        """Forget the gradients of a replaced step, and what a step that was not taken had prepared."""
        missed = {(i, tick) for i, tick in self._ticks.items() if self._ownership.owns[i] and self._concluded.get(i) != tick}
        self.skipped += len(missed - self._missed)
        self._missed = missed
        self.store.put_back(self.params)
        self._gradients.release(self._ownership.optimizers)

    def rebind(self, optimizers: Sequence[Optimizer], gradients_read: Sequence[bool]) -> None:
        """Go on with other optimizers for the same parameters, in the same order."""
        self._bind(optimizers)
        self._gradients_read = list(gradients_read)

    def end(self) -> None:
        """Take all hooks away; masks and counters stay."""
        for handle in self._handles:
            handle.remove()
        self._unbind()

    # ------------------------------------------------------------------ state

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: hooks and the hold on a model stay behind."""
        idle = object.__new__(type(self))
        idle._unbind()
        return {**vars(self), **vars(idle), "_model": _no_model}

    def engine_state(self) -> dict[str, Any]:
        """Everything that a resume needs: tensors, numbers and strings only."""
        return {
            **self.progress.state(),
            "updates": self.updates,
            "masks": {n: m.clone() for n, m in self.masks.items()},
            "aux": {n: t.clone() for n, t in self.aux.items()},
            "dense": {n: self.store.dense(n).clone() for n in self.store.hidden},
        }

    def _load(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Take over counters and method state; gives the masks."""
        saved: Mapping[str, Tensor] = state["masks"]
        wrong = [n for n in {**self.params, **saved} if n not in saved or n not in self.params or saved[n].shape != self.params[n].shape]
        if wrong:
            raise ValueError(
                f"the checkpoint's masks do not fit the model: {', '.join(wrong)} differ in name or shape. Resume with the model and the "
                "include=, exclude=, keep_dense= of the interrupted run, or give fresh_start=True to make new masks."
            )
        self.progress = Progress(self.anchor)
        self.progress.load({"steps": state["steps"], "done": state["done"]})
        self.updates = state["updates"]
        devices = {n: p.device for n, p in self.params.items()}
        self.aux = {k: t.to(devices.get(k.split("/", 1)[-1], t.device)) for k, t in state["aux"].items()}
        return saved


def refuse_foreign_weights(masks: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Refuse to put the masks of the last run on weights that came from elsewhere since.

    Raises:
        ValueError: a weight is not zero where its mask is.
    """
    foreign = [n for n, mask in masks.items() if bool(params[n].detach()[~mask.to(params[n].device)].any())]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} hold weights that the masks of the last fit would cut: other weights were loaded since (for example by "
            "test(ckpt_path='best')). Resume with ckpt_path= to get the masks that belong to them, or use a new callback or "
            "fresh_start=True for new masks."
        )
