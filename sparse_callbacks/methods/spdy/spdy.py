"""SPDY: the sparsity of each layer that spoils least of all that the network can afford."""

import warnings
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.arguments import check_seed, refuse_unknown
from sparse_callbacks.core.calibration import Loss
from sparse_callbacks.core.checkpoint import shown
from sparse_callbacks.core.data_pass import NoPassError
from sparse_callbacks.core.error_text import naming
from sparse_callbacks.core.example_inputs import example_inputs, why_not_taken
from sparse_callbacks.core.found_shares import weights_of
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.local_parts import is_sharded
from sparse_callbacks.core.randomness import generator
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.methods.spdy.errors import index_errors, magnitude_errors
from sparse_callbacks.methods.spdy.levels import LayerCosts, flop_costs
from sparse_callbacks.methods.spdy.search import best_levels, searched
from sparse_callbacks.methods.spdy.stitched import Stitched
from sparse_callbacks.methods.spdy.time_table import TimeTable

ERRORS = ("magnitude", "calibration")


class LayerShares(NamedTuple):
    """What a budget comes to in one model.

    Attributes:
        sparsities: the sparsity of each layer.
        costs: what each layer costs at each of its levels.
        levels: index of the level of each layer.
    """

    sparsities: dict[str, float]
    costs: LayerCosts
    levels: dict[str, int]

    @property
    def reached(self) -> float:
        """The cost as a share of the dense one; at most the budget."""
        return self.costs.at(self.levels) / self.costs.dense


@dataclass(frozen=True, repr=False)
class Spdy:
    """Sparsities by layer for ``distribution=`` of any method: the least total error within a budget of cost (SPDY).

    Each layer is dense or at one of 41 sparsities from 0.4 to 0.99, whose densities fall by one factor. Over all layers l
    and their levels s, the choice minimises sum e(l, s) subject to sum cost(l, s) <= budget * dense cost, exactly. The
    budget decides how sparse the network becomes, so ``sparsity=`` is left out. Layers that stay dense by ``exclude=`` or
    ``keep_dense=`` cost what they do. It is decided once, when a run begins, and kept in checkpoints.

    Differs from the paper: the knapsack is solved exactly, without buckets of time, so costs never exceed the budget, and
    a budget that cannot be met is refused. The error ``"magnitude"`` is ours. The search judges networks pruned by
    magnitude, in place of ones that a second-order method has pruned.

    Args:
        budget: cost of the sparse network as a share of the dense one's, in (0, 1).
        cost: ``"flops"`` (of a forward pass of one sample, two for each active weight and position it is used at; recurrent
            layers, embeddings and products of attention as in :class:`~sparse_callbacks.SMCP`), or the path of a table
            (``.json``) of milliseconds by layer and sparsity, which ``python -m sparse_callbacks.allocate`` measures.
        error: ``"magnitude"``: the share of the layer's squared weights that pruning removes (see
            :func:`~sparse_callbacks.methods.spdy.errors.magnitude_errors`). ``"calibration"``, as published: (i / 41)^2 for
            the level with index i, times a coefficient of the layer in [0, 1]; of the coefficients that 100 random draws
            and a local search try, those whose network, pruned by magnitude, has the least loss on ``batches``. That is
            some hundreds of passes, in a run.
        input: size of one sample without the batch, such as ``(3, 32, 32)``, of which FLOPs are counted; None: the model's
            ``example_input_array``, or else the first batch of training data in a run.
        batches: number of batches of the training data that losses are taken on.
        loss: a function of the module and a batch that gives the loss; None: that of ``training_step``.
        seed: of the search and of the batches.

    Raises:
        ValueError: an argument that no model can make right. When a run begins or a plan is made: a budget that cannot be
            met, with the smallest that can; no sample or data to take; a table of another model.

    Example:
        >>> from sparse_callbacks import RigL, Spdy
        >>> RigL(distribution=Spdy(budget=0.5, cost="flops")).distribution
        Spdy(budget=0.5, cost='flops', error='magnitude')

    Reference: Frantar, Alistarh: SPDY: Accurate Pruning with Speedup Guarantees. ICML 2022.
    """

    budget: float = 0.5
    cost: str = "flops"
    error: str = "magnitude"
    _: KW_ONLY
    input: Sequence[int] | None = None
    batches: int = 8
    loss: Loss | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in _checked(self).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        always = ("budget", "cost", "error")
        defaults = {f.name: f.default for f in fields(self)}
        parts = [f"{n}={shown(v)}" for n, v in given.items() if n in always or v != defaults[n]]
        return f"{type(self).__name__}({', '.join(parts)})"

    def shares(self, model: nn.Module, entries: Sequence[Entry]) -> dict[str, float]:
        """See :class:`~sparse_callbacks.core.allocations.sees_model.SeesModel`."""
        return self.layer_shares(model, entries).sparsities

    def shares_in_run(self, model: nn.Module, entries: Sequence[Entry], host: Host) -> dict[str, float]:
        """See :class:`~sparse_callbacks.core.allocations.sees_model.SeesData`."""
        return self.layer_shares(model, entries, host).sparsities

    def layer_shares(self, model: nn.Module, entries: Sequence[Entry], host: Host | None = None) -> LayerShares:
        """What :meth:`shares` gives, with the costs that it follows from.

        Args:
            model: the model, which is left as it was.
            entries: all parameters of it; those without a reason are selected.
            host: the training loop of a run that begins; None: there is no data.

        Raises:
            ValueError: see the class.
        """
        if self.error == "calibration" and host is None:
            raise ValueError(
                f"{self!r} takes losses on training data, and there is none outside of a run. Call plan() without a model "
                "once training has begun, or give error='magnitude', which needs the weights alone."
            )
        costs = self._costs(model, entries, host)
        if self.error == "magnitude":
            errors = _errors_by_magnitude(model, entries, costs)
        else:
            assert host is not None
            errors = self._errors_by_calibration(model, entries, costs, host)
        chosen = best_levels(costs, errors, self.budget)
        return LayerShares({layer: costs.levels[layer][i] for layer, i in chosen.items()}, costs, chosen)

    def _costs(self, model: nn.Module, entries: Sequence[Entry], host: Host | None) -> LayerCosts:
        if self.cost == "flops":
            return flop_costs(model, _example_of(model, self.input, host), entries)
        table = TimeTable.load(self.cost)
        for text in table.doubts(self.cost) if distributed.rank() == 0 else ():
            warnings.warn(text, stacklevel=2)
        return table.costs(entries)

    def _errors_by_calibration(
        self, model: nn.Module, entries: Sequence[Entry], costs: LayerCosts, host: Host
    ) -> dict[str, list[float]]:
        unweighted = {layer: index_errors(len(levels)) for layer, levels in costs.levels.items()}
        best_levels(costs, unweighted, self.budget)  # refuses a budget before the first pass
        with self._names_its_arguments():
            calibration = host.calibration(self.batches, loss=self.loss, seed=self.seed).held()
        network = Stitched(model, entries, costs.levels, calibration)

        def errors(coefficients: Sequence[float]) -> dict[str, list[float]]:
            pairs = zip(unweighted.items(), coefficients, strict=True)
            return {layer: [c * e for e in of_layer] for (layer, of_layer), c in pairs}

        def judged(coefficients: Sequence[float]) -> float:
            with self._names_its_arguments():
                return network.loss(best_levels(costs, errors(coefficients), self.budget))

        with network.in_place():
            best = searched(len(unweighted), judged, generator(self.seed, 0, "spdy"))
        return errors(best)

    def _names_its_arguments(self) -> AbstractContextManager[None]:
        """Errors of the losses say whose arguments they speak of: the method has none of these names, or others."""
        whose = "Here loss= is an argument of Spdy, and batches= of it is their number."
        return naming(f"distribution={self!r}", whose)


def _errors_by_magnitude(model: nn.Module, entries: Sequence[Entry], costs: LayerCosts) -> dict[str, list[float]]:
    params = dict(model.named_parameters())
    if sharded := [e.name for e in entries if not e.reason and is_sharded(params[e.name])]:
        raise ValueError(
            f"Spdy looks at whole weights, and {sharded[0]} is sharded over processes. Give distribution= the sparsities that "
            "plan(model) shows of the model before it is sharded, as a mapping."
        )
    return {layer: magnitude_errors(w, costs.levels[layer]) for layer, w in weights_of(model, entries).items()}


def _example_of(model: nn.Module, size: Sequence[int] | None, host: Host | None) -> Any:
    """Inputs of one sample, that FLOPs are counted with.

    Raises:
        ValueError: there are none, or the model does not take them.
    """
    if size is None:
        return example_inputs(model, _no_data() if host is None else host.data_pass(values=False))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    example = torch.zeros(1, *size, dtype=like.dtype, device=like.device)
    if problem := why_not_taken(model, example):
        raise ValueError(
            f"input={tuple(size)}: {type(model).__name__} does not take a float tensor of size {[1, *size]} ({problem}). Give "
            "the size of one sample without the batch, or leave input= out and set the model's example_input_array."
        )
    return example


def _no_data() -> Generator[Any, None, None]:
    raise NoPassError("there is no training data outside of a run. ")
    yield


def _checked(given: Spdy) -> dict[str, Any]:
    """The arguments as they are kept.

    Raises:
        ValueError: one that no model can make right.
    """
    if isinstance(given.budget, bool) or not isinstance(given.budget, Real) or not 0.0 < float(given.budget) < 1.0:
        raise ValueError(f"budget={given.budget!r} is out of range. Give a number above 0 and below 1.")
    cost = str(given.cost)  # also a path
    if cost != "flops" and not cost.endswith(".json"):
        raise ValueError(f"cost={given.cost!r} is not known. Give 'flops' or the path of a table of times (.json).")
    refuse_unknown({"error": given.error}, {"error": ERRORS})
    size = given.input
    if isinstance(size, str | bytes) or (
        size is not None and (not isinstance(size, Sequence) or not all(map(_counts, size)))
    ):
        raise ValueError(
            f"input={size!r} is not the size of a sample. Give whole numbers from 1 on, such as (3, 32, 32)."
        )
    if not _counts(given.batches):
        raise ValueError(f"batches={given.batches!r} is not a number of batches. Give a whole number from 1 on.")
    if given.loss is not None and not callable(given.loss):
        raise ValueError(f"loss={given.loss!r} is not a function. Give one of module and batch that returns the loss.")
    check_seed(given.seed)
    for argument, usual in (("batches", given.batches == Spdy.batches), ("loss", given.loss is None)):
        if not usual and given.error == "magnitude":
            raise ValueError(
                f"{argument}= says nothing to error='magnitude', which looks at no data. Leave {argument}= out, or give "
                "error='calibration'."
            )
    kept = None if size is None else tuple(int(n) for n in size)
    return {
        "budget": float(given.budget),
        "cost": cost,
        "input": kept,
        "batches": int(given.batches),
        "seed": int(given.seed),
    }


def _counts(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
