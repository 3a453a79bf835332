"""Cells of the table: a feature with a method is run, and found exact, refused in words, dense or not applicable."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from support.methods import method, moves, promises

from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.runs import Stops, trainer_for

EXACT, REFUSED, DENSE, NOT_APPLICABLE, NOT_RUN = "exact", "refused", "dense", "n/a", "not run"
GROUPS = (
    "precision",
    "loops",
    "tools",
    "averages",
    "freezing",
    "checkpoints",
    "loaders",
    "models",
    "storage",
    "processes",
    "launchers",
)
"""Headings of the page, in their order."""


class NotApplicable(Exception):  # noqa: N818 - an outcome, like the next one
    """The feature has no meaning with this method; the text says why."""


class StaysDense(Exception):  # noqa: N818
    """The run ends, and a part of it is not sparse, with a warning; the text is the warning."""


@dataclass(frozen=True)
class Outcome:
    """What a cell says.

    Attributes:
        word: ``exact``, ``refused``, ``dense`` or ``n/a``.
        note: what the error, the warning or the reason says; empty where it is exact.
    """

    word: str
    note: str = ""


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        group: the heading that it stands under.
        title: its name in the table.
        run: takes a method's name and a folder, and asserts what "exact" promises.
        launch: gives the outcomes of all methods from one launch of processes; then ``run`` is not asked.
    """

    group: str
    title: str
    run: Callable[[str, Path], None] | None = None
    launch: Callable[[Path], dict[str, Outcome]] | None = None


FEATURES: dict[str, Feature] = {}
"""Rows of the table by their titles, as they were registered."""


def ordered() -> dict[str, Feature]:
    """Rows of the table by their titles, in the order of the page."""
    return dict(sorted(FEATURES.items(), key=lambda item: GROUPS.index(item[1].group)))


def feature(group: str, title: str) -> Callable[[Callable[[str, Path], None]], Callable[[str, Path], None]]:
    """Makes a function a row of the table."""

    def register(run: Callable[[str, Path], None]) -> Callable[[str, Path], None]:
        FEATURES[title] = Feature(group, title, run)
        return run

    return register


def launched_feature(group: str, title: str, launch: Callable[[Path], dict[str, Outcome]]) -> None:
    """A row of the table whose cells come from one launch of processes."""
    FEATURES[title] = Feature(group, title, launch=launch)


def outcome_of(run: Callable[[], None]) -> Outcome:
    """What a run comes to; anything but the four outcomes is raised."""
    Trained.batches = 0
    try:
        run()
    except NotApplicable as reason:
        return Outcome(NOT_APPLICABLE, str(reason))
    except StaysDense as warning:
        return Outcome(DENSE, gist(str(warning)))
    except (ValueError, TypeError, RuntimeError) as error:
        if not _is_ours(error) or Trained.batches:
            raise
        return Outcome(REFUSED, gist(str(error)))
    return Outcome(EXACT)


def _is_ours(error: Exception) -> bool:
    """The error was raised by the package, and not by torch, Lightning or a test."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return "sparse_callbacks" in file.parts and "testing" not in file.parts


def gist(text: str) -> str:
    """The first two sentences of a message, for a note."""
    return ". ".join(" ".join(text.split()).split(". ")[:2]).rstrip(".") + "."


# ---------------------------------------------------------------------- runs of cells


class Trained(pl.Callback):
    """Holds every batch to the invariant, and counts them."""

    batches = 0

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        Trained.batches += 1
        assert_effective(module, self.callback)


def train(
    name: str,
    module: pl.LightningModule,
    *more: pl.Callback,
    loader: Any = None,
    folder: Path | None = None,
    ckpt_path: Any = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Any]:
    """A short run in which weights are what masks leave of them after every batch; at its end there are as many zeros
    as planned, and masks have moved where the method moves them."""
    callback = method(name, **(arguments or {}))
    trainer = trainer_for([callback, *more, Trained(callback)], folder, **options)
    trainer.fit(module, Batches() if loader is None else loader, ckpt_path=ckpt_path)
    check_end(name, module, callback)
    return trainer, callback


def check_end(name: str, module: torch.nn.Module, callback: Any) -> None:
    """At the end of a run: sparse weights, planned counts, masks that have moved, and nothing that is not finite."""
    assert_effective(module, callback)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert sum(int((~m).sum()) for m in callback.masks.values()) > 0 or name in ("l0", "smcp")
    if promises(name, "planned counts") and callback.at_target:
        assert_counts(callback)
    if moves(name):
        assert callback.updates > 0


def resumes(name: str, make: Callable[[], pl.LightningModule], folder: Path, **options: Any) -> None:
    """A run that goes on from a checkpoint within its second epoch ends bitwise where one ends that never stopped."""
    stops, module = Stops(folder, (11,)), make()
    trainer, callback = train(name, module, stops, **options)
    expected = snapshot(trainer, module, callback)
    again = make()
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1.0)  # whatever it begins with
    found = snapshot(*_second(name, again, stops.path(11), options))
    assert differences(expected, found) == []


def _second(name: str, module: pl.LightningModule, path: Path, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    trainer, callback = train(name, module, ckpt_path=path, **options)
    return trainer, module, callback
