"""Where first masks come from: chance, magnitudes, a score, the zeros of the model, or a checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.checkpoint import SavedRun, shown
from sparse_callbacks.core.distributions import decides_total
from sparse_callbacks.core.found_masks import WAITING, FoundMasks, MaskSource, found_masks
from sparse_callbacks.core.given_masks import GivenMasks, Source
from sparse_callbacks.core.method import DEFAULT_SPARSITY, Method
from sparse_callbacks.core.ops import keep_largest
from sparse_callbacks.core.pattern_arguments import kept_pattern, sparsity_beside
from sparse_callbacks.core.pattern_layers import fitting
from sparse_callbacks.core.pattern_names import FanIn, asked_nm, asked_pattern
from sparse_callbacks.core.pattern_starts import largest_of_pattern, starts_by_pattern
from sparse_callbacks.core.patterns import (
    as_mask,
    drawn_columns,
    group_of,
    largest_columns,
    reached_targets,
    share_of,
)
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.randomness import uniform_like
from sparse_callbacks.core.rescaling import RESCALES, Rescale
from sparse_callbacks.core.score_options import Score, score_in
from sparse_callbacks.core.scored_start import first_score
from sparse_callbacks.core.selection import Entry, select
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.state_layout import shown_short
from sparse_callbacks.core.storages.storage import Rows, StorageByLayer, check_storage
from sparse_callbacks.core.storages.storage_choice import planned_choices, refuse_choices
from sparse_callbacks.core.thawed import masks_by_magnitude

InitialMask = Source | Score
"""``"random"``, ``"magnitude"``, ``"nonzero"``, the name of a score or a :class:`Score`, the path of a checkpoint, or a state
dict."""


class StartsSparse(Method):
    """A method whose network is sparse from the first step on, and who may be told where its first masks lie.

    Args:
        sparsity: target fraction of zeros, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        initial_mask: ``"random"``: random positions. ``"magnitude"``: the largest weights as they are when a run
            begins. ``"snip"``, ``"grasp"``, ``"synflow"``, ``"crop"``, ``"fisher"``, or a
            :class:`~sparse_callbacks.core.score_options.Score` with its options: the weights of each layer with the largest
            scores, before the first batch. ``"nonzero"``: the weights that are not zero then. The path of a checkpoint, or a
            state dict: masks that a run of this package has saved there, otherwise its non-zeros; only the masks are taken,
            and the weights are those of the model. The last two bring their own counts, in place of those that ``sparsity``
            and ``distribution`` plan. A run that goes on keeps its masks, whatever is given.
        rescale: active weights of a new run are multiplied once, by sqrt(1 / density) of their ``"layer"``, or for each
            output unit by the root of its ``"fan_in"`` over the inputs that it keeps; None: they stay as they are.
        pattern: ``"2:4"``: of every 4 inputs of an output 2 are active (of a convolution: input channels at a position of
            the kernel), first ones by chance, magnitude or score in each group; ``"transposable 2:4"``: 2 in each row and
            column of every tile of 4 outputs by 4 inputs. (Other whole numbers too.) The sparsity is 1 - N/M, and layers
            that do not divide stay dense, as ``plan()`` says. ``"fan_in/64"``: in linear layers every 64 consecutive output
            rows read the same inputs, as many in each group of rows: max(1, round(density * inputs)), so that ``plan()``
            may show a little more or less sparsity. (64 may be any whole number from 1.) Layers of other kinds, and those
            whose rows the number does not divide, stay dense, as ``plan()`` says. ``"fan_in"``: each output unit of every
            layer, convolutions too, has as many inputs of its own: max(1, floor(density * inputs)). None: no layer has one.
        storage: ``"masked"``: dense matrices under masks. ``"sparse"``: linear layers hold their live weights alone, in a
            `SparseLinear`, on the CPU. ``"grouped"``: the same, where every ``group`` consecutive output rows read the same
            inputs, max(1, round(density * inputs)) of them, as under ``pattern="fan_in/64"``; layers that cannot are under masks
            without a pattern, and with that pattern beside it dense. ``"auto"``: masked or sparse, whichever is faster by their
            times. Or a mapping of globs on parameter names to these, of which the first that matches counts. ``plan()`` says
            which layer has which, and why one stays masked.
        group: output rows that read the same inputs under ``"grouped"``; where it does not divide the rows of a layer, that
            layer stays masked.
        rows: rows that each layer sees in a step (the size of the batch, times the length of its sequences), or such
            numbers by glob, for ``"auto"``; None: they are looked up with a batch, where the loop gives one.
        **options: arguments of :class:`~sparse_callbacks.core.method.Method`.

    Raises:
        ValueError: an argument that no run can use.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        pattern: str | None = None,
        storage: StorageByLayer = "masked",
        group: int = 64,
        rows: Rows | None = None,
        **options: Any,
    ) -> None:
        pattern = kept_pattern(pattern)
        target = sparsity_beside(self, pattern, sparsity, options.get("distribution"))
        super().__init__(DEFAULT_SPARSITY if target is None else target, **options)
        check_storage(self, storage, group, rows, pattern)
        self.storage = dict(storage) if isinstance(storage, Mapping) else storage
        self.group, self.rows = group, dict(rows) if isinstance(rows, Mapping) else rows
        if not isinstance(initial_mask, str | Path | Mapping | Score) or not initial_mask:
            raise ValueError(
                f"initial_mask={shown_short(initial_mask)} is not known. Give 'random', 'magnitude', 'nonzero', the path "
                "of a checkpoint, a state dict, or a score such as 'snip'."
            )
        refuse_unknown({"rescale": rescale}, {"rescale": (None, *RESCALES)})
        self.initial_mask, self.rescale, self.pattern = initial_mask, rescale, pattern
        self._score = score_in(initial_mask)
        if self._score is not None and (storage != "masked" or isinstance(asked_pattern(self), FanIn)):
            stands = f"storage={shown_short(storage)}" if storage != "masked" else f"pattern={pattern!r}"
            chooses = "decides before that which weights there are" if storage != "masked" else "keeps them by rows"
            raise ValueError(
                f"initial_mask={shown_short(initial_mask)} ranks single weights when training starts, and {stands} {chooses}. "
                f"Leave {stands.partition('=')[0]}= out, or give initial_mask='magnitude'."
            )
        # a subclass that has another name for it keeps each argument as it was given
        argument = "from_checkpoint" if getattr(self, "from_checkpoint", None) is not None else "initial_mask"
        # before there is data, and for layers that join later, magnitudes stand for a score
        self._source = MaskSource(
            "magnitude" if isinstance(initial_mask, Score) or self._score else initial_mask, argument
        )
        self._found = FoundMasks({}, 0.0, None)
        if not self._source.brings_counts:
            return
        if decides_total(self.distribution):
            raise ValueError(
                f"{self._source.shown} and distribution={shown(self.distribution)} both say how many weights there are. Give one "
                "of them."
            )
        if sparsity is None:
            self.sparsity = None  # a resumed run compares the arguments

    @property
    def target_sparsity(self) -> float:
        if self._source.brings_counts:
            if not self._found.sparsity and self.entries:  # of a run in another process, which has found them there
                planned = self.parameter_zeros(self.entries, self.targets)
                size = sum(e.size for e in self.entries if e.name in planned)
                self._found = replace(self._found, sparsity=sum(planned.values()) / size)
            return self._found.sparsity
        if (asked := asked_nm(self)) is not None:
            return asked.sparsity
        return DEFAULT_SPARSITY if self.sparsity is None else float(self.sparsity)

    def plan(self, model: nn.Module | None = None) -> Plan:
        known = self.attachment.choices
        if isinstance(model, nn.Module):
            plain = getattr(model, "_orig_mod", model)  # of torch.compile
            entries = fitting(self, select(plain, self.include, self.exclude, self.keep_dense))
            self.attachment.choices = planned_choices(self, plain, entries)
            find_masks(self, plain, entries, self.saved)
            self._forget_given()  # a run looks again
        try:
            made, choices = super().plan(model), self.attachment.choices
            refuse_choices(self.storage, choices, {row.name for row in made if row.zeros == 0})
            return made.with_storages(choices)
        finally:
            self.attachment.choices = known

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        if not self._source.brings_counts:
            return reached_targets(self, super().share_out(entries), entries)
        chosen = [e for e in entries if not e.reason]
        if not all(layer in self._found.zeros for e in chosen for layer in e.layers):
            self._find(self.attachment.model, entries, self.saved)
        return {layer: share_of(self._found.zeros[layer], e.size // e.parts) for e in chosen for layer in e.layers}

    def initial_masks(self) -> dict[str, Tensor]:
        if (scored := self.attachment.scored) is not None:
            return {n: scored[n] for n in self.params}
        if self._source.start == "random":
            return super().initial_masks()
        if self._source.start == "magnitude":
            return {n: self.weights.by_layer(n, self._largest, p.detach()) for n, p in self.params.items()}
        given = self._found.given
        assert given is not None
        return self._take_given(n for n in self.params if n in given.masks)

    def _take_given(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The masks that were found for ``names``; those of layers that wait to be trained are kept until they are."""
        given = self._found.given
        assert given is not None
        masks, taken = given.masks, list(names)
        # kept where masks move: part of the network may be dense for a while, and a saved mask may be damaged
        for name in taken if self.explores or self.arrives_at_stop else ():
            layers = self.weights.entries[name].layers
            self.aux[f"planned/{name}"] = torch.tensor([self._found.zeros[layer] for layer in layers])
        for name in masks:  # a resumed run needs them, and what they came from may be gone
            if name in taken:
                self.aux.pop(f"{WAITING}/{name}", None)
            else:
                self.aux[f"{WAITING}/{name}"] = masks[name].clone()
        self._forget_given()
        return {n: masks[n] for n in taken}

    def _random_mask(self, layer: str, weight: Tensor) -> Tensor:
        if starts_by_pattern(self):
            return largest_of_pattern(self, layer, uniform_like(weight, self.generator(layer, 0)))
        if (group := self._group(layer)) is None:
            return super()._random_mask(layer, weight)
        rows, inputs = weight.shape
        columns = drawn_columns(rows // group, inputs, self._columns(layer, weight), self.generator(layer, 0))
        return as_mask(columns, group).to(weight.device)

    def _largest(self, layer: str, weight: Tensor) -> Tensor:
        if starts_by_pattern(self):
            return largest_of_pattern(self, layer, weight.abs())
        if (group := self._group(layer)) is not None:
            return largest_columns(weight, self._columns(layer, weight), group)
        size = layout_of(weight).whole_shape(weight).numel()
        return keep_largest(weight, size - self.planned_zeros(layer, size))

    def _group(self, layer: str) -> int | None:
        """The group of a layer's pattern; None where it has none."""
        entry = self.weights.entries.get(layer)  # only a layer that is a whole parameter has one
        return None if entry is None else group_of(self, entry)

    def _columns(self, layer: str, weight: Tensor) -> int:
        """The planned number of active columns in each block of a layer."""
        return weight.shape[1] - self.planned_zeros(layer, weight.numel()) // weight.shape[0]

    def _find(
        self, model: nn.Module | None, entries: Sequence[Entry], saved: SavedRun | None, together: bool = False
    ) -> None:
        self._found = found_masks(self, self._source, model, entries, saved, together)

    def _forget_given(self) -> None:
        self._found = replace(self._found, given=None)


# ---------------------------------------------------------------------- what a run asks before it begins


def find_masks(
    method: Method, model: nn.Module, entries: Sequence[Entry], saved: SavedRun | None, together: bool = False
) -> None:
    """Let a method whose masks bring their own counts look for them, before it is asked for its targets.

    Args:
        method: the method, of any kind.
        model: the model.
        entries: all parameters of it.
        saved: the run that goes on; None for that of ``method.aux``, or a new one.
        together: whether all ranks ask, which then take what the first has found.

    Raises:
        ValueError: there is no mask, or it does not fit the model or the other arguments.
    """
    if isinstance(method, StartsSparse) and brings_counts(method):
        method._find(model, entries, saved, together)


def brings_counts(method: Method) -> bool:
    """Whether the first masks of a method have counts of their own, in place of planned ones."""
    return isinstance(method, StartsSparse) and method._source.brings_counts


def given_mask(method: Method, name: str) -> Tensor | None:
    """The mask that was found for a parameter; None where the method makes one."""
    given = method._found.given if isinstance(method, StartsSparse) else None
    return None if given is None else given.masks.get(name)


def forget_given(method: Method) -> None:
    """Let go of the masks that were found: a run looks for those that it needs again."""
    if isinstance(method, StartsSparse):
        method._forget_given()


@dataclass(frozen=True)
class Start:
    """Where the first masks of a method lie.

    Attributes:
        shown: the argument that says so, for errors.
        at_random: they are drawn.
        brings_counts: the counts of the masks are found and not planned.
        given: masks that were found, until a run takes them.
    """

    shown: str
    at_random: bool
    brings_counts: bool
    given: GivenMasks | None


def start_of(method: StartsSparse) -> Start:
    """Where the first masks of a method lie."""
    source = method._source
    return Start(source.shown, source.start == "random", source.brings_counts, method._found.given)


def joining_masks(method: StartsSparse, names: Sequence[str]) -> dict[str, Tensor]:
    """Masks of layers that join a run which has begun: those that were found for them, otherwise by magnitude.

    Args:
        method: the method of the run; its parameters are those with the new layers.
        names: names of the parameters that join.
    """
    if brings_counts(method):
        return method._take_given(names)
    return {n: method.weights.by_layer(n, method._largest, method.params[n].detach()) for n in names}


masks_by_magnitude.register(StartsSparse, joining_masks)


@first_score.register
def _(method: StartsSparse) -> Score | None:
    return method._score
