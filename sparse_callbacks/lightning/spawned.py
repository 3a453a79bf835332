"""Brings masks and state back from processes that a launcher starts, as Lightning does with weights.

Under ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` the Trainer of the main process hands its work to processes, and
calls no hook of the callbacks that stay behind. So a callback notices on its own that it is being copied into another
process, by fork or by pickle, and from then on expects a file. The process whose weights come back writes it where a
fit ends, and the callback that stayed reads it where somebody first asks for what a run has: then the state of the run
is missing from its attributes, and Python calls ``__getattr__``. In training nothing of this costs anything.
"""

import os
import tempfile
import uuid
import weakref
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import parent_process
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.files import replacing
from sparse_callbacks.core.live.saved_patterns import live_in
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.restored import describe, take_saved
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.lightning.dense_shapes import dense_shapes
from sparse_callbacks.lightning.refusals import has_class_named

if TYPE_CHECKING:
    from sparse_callbacks.lightning.callback import SparsityCallback

RUN = frozenset(("aux", "progress", "calendar", "weights", "entries", "targets", "owners"))
"""Attributes of a method that a run changes, and that are missing while a file is expected."""
UNKNOWN = 0
"""Stands for the ``id`` of a model that other processes know by another one."""
_LAUNCHERS = ("_MultiProcessingLauncher",)


@dataclass
class Handover:
    """The way of a callback's state from a launched process to the one that launched it.

    Attributes:
        path: the file, once it has a name; it exists from the end of a fit to the first look.
        launcher: the process that expects the file.
        above: the handover to the process that has launched the launcher, if it was launched itself.
        kept: the state before the launch, while a file is expected; else None.
        brought: what was read, until a fit has taken it for its model.
    """

    path: Path | None = None
    launcher: int = field(default_factory=os.getpid)
    above: "Handover | None" = None
    kept: dict[str, Any] | None = None
    brought: dict[str, Any] | None = None


_callbacks: "weakref.WeakSet[SparsityCallback]" = weakref.WeakSet()
"""Callbacks of the Trainers of this process, which a fork would copy."""


def watch(callback: "SparsityCallback") -> None:
    """Notice where ``callback`` is copied into a process that is forked."""
    _callbacks.add(callback)


def _handover_of(callback: Method) -> Handover | None:
    found: Handover | None = vars(callback).get("_handover")
    return found


# ---------------------------------------------------------------------- the process that launches


def prepare(callback: Method) -> Handover:
    """``callback`` is about to be copied into another process: name the file."""
    bring_back(callback)  # of an earlier launch: the copy is to go on from there
    handover = _handover_of(callback)
    if handover is None or handover.path is None or handover.launcher != os.getpid():
        path = Path(tempfile.gettempdir()) / f"sparse_callbacks-{uuid.uuid4().hex}.pt"
        handover = Handover(path, above=handover, brought=None if handover is None else handover.brought)
        vars(callback)["_handover"] = handover
        # where nobody ever looks, the file goes with the callback or with the process
        weakref.finalize(callback, _remove, path, handover.launcher)
    return handover


def expect(callback: Method) -> None:
    """``callback`` was copied into another process, which may bring back another state."""
    handover = _handover_of(callback)
    if handover is not None and handover.kept is None:
        handover.kept = {name: vars(callback).pop(name) for name in RUN}


def bring_back(callback: Method) -> None:
    """Take the state that a launched process has left, if there is one; otherwise that of before the launch."""
    handover = _handover_of(callback)
    if handover is None or handover.kept is None:
        return
    vars(callback).update(handover.kept)
    handover.kept = None
    assert handover.path is not None
    if not handover.path.exists():  # no fit was launched, or none has ended
        return
    brought = torch.load(handover.path, map_location="cpu", weights_only=True)
    _remove(handover.path, handover.launcher)
    model, saved = callback.attachment.model, SavedRun.of(brought["state"], handover.path)
    if model is not None and fits(saved, model):
        # a ValueError: the model of an earlier fit, which the launched one did not train
        with suppress(ValueError):
            take_saved(callback, model, saved, brought["owned"])
            return
    handover.brought = brought
    callback.attachment.forget()
    entries = [Entry(**e) for e in brought["entries"]]
    describe(callback, brought["weights"], entries, brought["targets"], saved, brought["owned"])


def discard(callback: Method) -> None:
    """The launched fit has failed, and its weights do not come back: neither does its state."""
    handover = _handover_of(callback)
    if handover is not None and handover.kept is not None and handover.path is not None:
        _remove(handover.path, handover.launcher)
        bring_back(callback)


def state_brought(callback: Method) -> dict[str, Any] | None:
    """The state that was brought back, while the callback does not know the model that it is of."""
    handover = _handover_of(callback)
    if handover is None or handover.brought is None or callback.attachment.model is not None:
        return None
    state: dict[str, Any] = handover.brought["state"]
    return state


def forget_brought(callback: Method) -> None:
    """Training begins, or is to begin anew: what was brought back has been taken or is not wanted."""
    handover = _handover_of(callback)
    if handover is not None:
        handover.brought = None


def run_brought(callback: Method, model: nn.Module) -> SavedRun | None:
    """The run that was brought back, if a fit of ``model`` goes on from it; None where it does not.

    Args:
        callback: the callback of the fit that begins.
        model: its model.
    """
    handover, state = _handover_of(callback), state_brought(callback)
    if handover is None or handover.brought is None or state is None:
        return None
    if handover.brought["model"] not in (UNKNOWN, id(model)):
        return None  # a forked process had the same objects, and trained another model
    # a copy: in processes that were spawned together these tensors lie in memory that they share, and training writes
    saved = SavedRun.of(deepcopy(state), handover.path)
    return saved if fits(saved, model) else None


def adopt(callback: Method, model: nn.Module) -> None:
    """A fit of ``model`` begins: it goes on from what was brought back, unless it is another model.

    Raises:
        ValueError: the model has parameters of these names and shapes, and the masks do not belong to its weights.
    """
    handover, saved = _handover_of(callback), run_brought(callback, model)
    if handover is not None and handover.brought is not None and saved is not None:
        take_saved(callback, model, saved, handover.brought["owned"])


def fits(saved: SavedRun, model: nn.Module) -> bool:
    """Whether any mask or pattern of ``saved`` has the name and shape of a parameter of ``model``."""
    shapes = dense_shapes(model)
    of_masks = any(shapes.get(n) == m.shape for n, m in saved.masks.items())
    return of_masks or any(n in shapes and live_in(p, tuple(shapes[n])) for n, p in saved.patterns.items())


def _remove(path: Path, launcher: int) -> None:
    if os.getpid() == launcher:  # a forked process has the same callbacks, and the file is not its own
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- the process that was launched


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # the folder is everybody's


def _content(callback: "SparsityCallback", model: int = UNKNOWN) -> dict[str, Any]:
    """Everything that describes the latest run where its model is not known: tensors, numbers and strings only."""
    weights = {n: p.detach().clone() for n, p in callback.params.items()}
    # as they come back, by the weights of a module whose layers are dense
    for name, layer in callback.weights.layers_stored.items():
        weights[name] = layer.places.dense(layer.values.detach())
    return {
        "model": model,
        "state": callback.engine.state(),
        "entries": [asdict(e) for e in callback.entries],
        "targets": dict(callback.targets),
        "owned": [list(names) for names in callback.owners.owns],
        "weights": weights,
    }


def hand_over(callback: "SparsityCallback", trainer: Any) -> None:
    """A fit has ended: leave its state for the process that launched this one, if one did.

    Args:
        callback: the callback of the fit.
        trainer: the Trainer of the fit. Of its processes on a machine the first one writes, whose weights Lightning
            brings back too.
    """
    if not has_class_named(trainer.strategy.launcher, _LAUNCHERS) or trainer.strategy.local_rank != 0:
        return
    path, parent, handover = None, parent_process(), _handover_of(callback)
    while handover is not None and parent is not None and path is None:
        path = handover.path if handover.launcher == parent.pid else None
        handover = handover.above
    if path is None or not callback.masks:
        return
    # a fork leaves objects where they are, so that the launching process knows its model by this number
    forked = trainer.strategy.launcher._start_method == "fork"
    model = id(trainer.lightning_module) if forked else UNKNOWN
    try:
        with replacing(path) as beside, open(beside, "xb", opener=_private) as file:
            torch.save(_content(callback, model), file)
    except OSError as error:  # the weights have their own way back, which may be open
        rank_zero_warn(
            f"{type(callback).__name__} cannot bring its masks back to the process that launched this one: {error}. "
            "They are in the checkpoints of this fit: test or resume with ckpt_path=."
        )


# ---------------------------------------------------------------------- copies


def handover_for_copy(callback: "SparsityCallback") -> Handover | None:
    """What a copy of ``callback`` gets: in a process that is being started the name of the file, elsewhere none, so that
    no two callbacks wait for one file."""
    bring_back(callback)
    if get_spawning_popen() is not None and callback.attachment.host is None:
        mine = prepare(callback)
        if callback.attachment.model is not None and callback.masks:
            # a process that is started knows no model either, and adopts the masks. They are kept here as well, since
            # torch sends the numbers of open files, which close with their tensors
            mine.brought = _content(callback)
        return replace(mine)
    handover = _handover_of(callback)
    return None if handover is None or handover.brought is None else Handover(brought=handover.brought)


def _before_fork() -> None:
    for callback in list(_callbacks):
        if callback.attachment.host is None:  # otherwise it trains here, and the fork is a worker of a loader, say
            prepare(callback)


def _after_fork() -> None:
    for callback in list(_callbacks):
        if callback.attachment.host is None:
            expect(callback)


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)
