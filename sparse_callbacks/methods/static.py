"""Static: one mask, held from the first step to the last."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.found_masks import one_of
from sparse_callbacks.core.initial_masks import InitialMask, StartsSparse
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.state_claims import Zeros, as_planned, possible_zeros
from sparse_callbacks.core.storages.storage import Rows, StorageByLayer, why_no_exchange


class Static(StartsSparse):
    """Static sparse training: one mask, drawn at random or given, held from the first step to the last.

    The baseline of every sparse-to-sparse method; and, with ``initial_mask``, fine-tuning that keeps a pruned network
    pruned.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        from_checkpoint: path of a checkpoint, or a state dict, whose zeros are the mask; another name of
            ``initial_mask``.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        pattern: where active weights may lie: ``"2:4"``, ``"transposable 2:4"``, ``"fan_in"`` or ``"fan_in/64"``; None: anywhere. See
            :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        storage: ``"masked"``, ``"sparse"``, ``"grouped"``, ``"auto"`` or a mapping of globs to these: whether linear layers hold dense
            matrices under masks, or their live weights alone; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        group: number of output rows that read the same inputs under ``storage="grouped"``.
        rows: rows of input that each layer sees in a step (batch size times sequence length), or such numbers by glob, for
            ``storage="auto"``; None: found with a batch.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range; ``sparsity`` beside ``from_checkpoint``; a checkpoint without zeros or of
            another model.

    Example:
        >>> from sparse_callbacks import Static
        >>> Static(sparsity=0.5, distribution="uniform").target_sparsity
        0.5
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        distribution: Distribution = "erdos_renyi_kernel",
        from_checkpoint: str | Path | Mapping[str, Any] | None = None,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        pattern: str | None = None,
        storage: StorageByLayer = "masked",
        group: int = 64,
        rows: Rows | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if sparsity is not None and from_checkpoint is not None:
            raise ValueError(
                f"sparsity={sparsity!r} and from_checkpoint= are both given, and both decide the mask. Give one of "
                "them."
            )
        self.from_checkpoint = from_checkpoint
        super().__init__(
            sparsity,
            initial_mask=one_of(initial_mask, "from_checkpoint", from_checkpoint),
            rescale=rescale,
            pattern=pattern,
            storage=storage,
            group=group,
            rows=rows,
            distribution=distribution,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        # as given, also None: a resumed run compares the arguments
        self.sparsity, self.initial_mask = sparsity, initial_mask


@possible_zeros.register
def _(method: Static, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    return as_planned(planned)


@why_no_exchange.register
def _(method: Static) -> str:
    return ""
