"""What tests read of a running callback beyond its public surface: one function for each thing, all of them here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.weights import SparseWeights
from sparse_callbacks.methods.gap.round_networks import kept_tensors


@dataclass
class Moment:
    """An update: the optimizer's own step count, the parameters whose masks move, and the figures for the log so
    far."""

    step: int
    names: list[str]
    figures: dict[str, float]


def _nothing(moment: Moment) -> None:
    return None


def around_updates(
    callback: Any, before: Callable[[Moment], Any] = _nothing, after: Callable[[Moment], Any] = _nothing
) -> None:
    """Call ``before`` and ``after`` around every update of the masks.

    The weights right before an update are seen at no hook of Lightning's: in most methods they are those that the
    optimizer has just written.
    """
    engine = callback.engine
    take = engine._take

    def takes(step: Any, update: Any) -> None:
        before(Moment(step.number, list(step.names), figures_to_log(callback)))
        take(step, update)
        after(Moment(step.number, list(step.names), figures_to_log(callback)))

    engine._take = takes


def when_attached(callback: Any, act: Callable[[], Any]) -> None:
    """Call ``act()`` in ``on_fit_start``, once the initial masks are made and before any weight is written."""
    attach = callback.attach

    def attached(model: nn.Module) -> None:
        act()
        attach(model)

    callback.attach = attached


def when_masks_are_made(callback: Any, act: Callable[[], Any]) -> None:
    """Call ``act()`` before initial masks are made."""
    initial = callback.initial_masks

    def made() -> dict[str, Tensor]:
        act()
        return initial()

    callback.initial_masks = made


def start_from(callback: Any, masks: Mapping[str, Tensor]) -> None:
    """Let the first fit start from copies of ``masks``."""
    callback.initial_masks = lambda: {n: m.clone() for n, m in masks.items()}


def skipped_steps(callback: Any) -> int:
    """Steps that the GradScaler has skipped in this run."""
    return int(callback.engine.skipped)


def parameters_of(callback: Any) -> dict[str, nn.Parameter]:
    """The sparse parameters by name."""
    return dict(callback.params)


def dense_values(callback: Any, name: str) -> Tensor:
    """Values of a parameter without its mask or gates; the tensor itself where a dense copy is kept."""
    return callback.weights.dense_values(name)


def gates_of(callback: Any, name: str) -> Tensor | None:
    """The gates that multiply a parameter now; None where it has a mask."""
    return callback.weights._factors.get(name)


def copied_names(callback: Any) -> list[str]:
    """Parameters with a dense copy."""
    return list(callback.weights.copied)


def held_tensors(callback: Any) -> list[Tensor]:
    """Every tensor besides the parameters that the callback's store of masks and copies keeps."""
    fields = (*vars(callback.weights).values(), *vars(callback.weights._copy).values())
    tensors = [t for field in fields if isinstance(field, dict) for t in field.values()]
    return [t for t in tensors if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]


def set_mask(callback: Any, name: str, mask: Tensor) -> None:
    """Give a parameter this mask, and write the weight accordingly."""
    callback.weights.set_masks({name: mask})


def figures_to_log(callback: Any) -> dict[str, float]:
    """Figures of updates that wait for the log."""
    return dict(callback.engine.events)


def planted_hooks(callback: Any) -> list[Any]:
    """Handles of the hooks that the callback has planted in optimizers and has not removed."""
    return list(callback.engine._hold.handles)


def give_calendar(callback: Any, every: int, start: int, stop: int) -> None:
    """The calendar of a run that is not started."""
    callback.calendar = Calendar(every, start, stop)


def count_writes(monkeypatch: Any, wrote: Callable[[str, int], None]) -> None:
    """Call ``wrote(parameter's name, writes)`` after each write of masked weights, as torch counts the writes to a
    tensor."""
    apply = SparseWeights.write_masked

    def counted(store: SparseWeights, names: Any, finite: bool = True) -> None:
        listed = list(names)
        before = {n: versions(store.params[n]) for n in listed}
        apply(store, listed, finite)
        for name in listed:
            wrote(name, versions(store.params[name]) - before[name])

    monkeypatch.setattr(SparseWeights, "write_masked", counted)


def versions(tensor: Tensor) -> int:
    """How often torch has seen a tensor written in place."""
    return tensor._version


# ---------------------------------------------------------------------- of single methods


def before_measuring(callback: Any, act: Callable[[], Any]) -> None:
    """CTRE: call ``act()`` before every pass over data for similarities, but not before the trial at the start of a
    run."""
    measured = callback._measure

    def measure(fraction: float) -> Any:
        if fraction:
            act()
        return measured(fraction)

    callback._measure = measure


def waits_for(callback: Any) -> Any:
    """CTRE: the count of epochs without improvement; None where growth does not depend on it."""
    return callback._patience


def count_kept_channels(callback: Any) -> None:
    """SMCP: read anew from the masks which channels are kept."""
    callback.note_kept()


def owners_of_groups(callback: Any) -> list[int]:
    """SMCP: the optimizer that steps each group of channels."""
    return list(callback.optimizer_of)


def kept_of_the_round(callback: Any) -> set[str]:
    """ParallelGaP: names of what it keeps of the round's start and of the workers that are done."""
    return {*kept_tensors(callback.aux, "start"), *kept_tensors(callback.aux, "gathered")}


def record_scores(callback: Any) -> list[Tensor]:
    """SMCP: the scores of each group of channels, at one solve after another."""
    seen: list[Tensor] = []
    scores = callback.scores

    def recorded() -> list[Tensor]:
        found = list(scores())
        seen.extend(found)
        return found

    callback.scores = recorded
    return seen


def scores_of(callback: Any) -> list[Tensor]:
    """SMCP: current scores of the channels of each group."""
    return list(callback.scores())


def after_epoch_starts(callback: Any, act: Callable[[], Any]) -> None:
    """ParallelGaP: call ``act()`` once an epoch's random numbers and data order are set."""
    start = callback.epoch_start

    def started(epoch: int) -> None:
        start(epoch)
        act()

    callback.epoch_start = started
