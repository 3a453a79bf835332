"""The ``Callback`` classes of every installed Lightning: a callback of ours is one of each."""

import importlib
from contextlib import suppress
from typing import Any

from pytorch_lightning import Callback

# `pytorch_lightning` and `lightning.pytorch` are two copies of one library with two `Callback` classes, and a Trainer
# or a LightningCLI of either asks `isinstance` of its own.
_OTHER = "lightning.pytorch"

# A Trainer of either, whose connectors set attributes on it that type checkers do not see.
Trainer = Any


def callback_classes() -> tuple[type[Any], ...]:
    """``pytorch_lightning.Callback``, and ``lightning.pytorch.Callback`` where that package is installed."""
    return (Callback, *classes_elsewhere("Callback"))


def classes_elsewhere(name: str) -> tuple[type[Any], ...]:
    """The class of this name in ``lightning.pytorch.callbacks``; empty where that package is not installed.

    Args:
        name: a class whose hooks are all empty, such as ``"Callback"`` or ``"Checkpoint"``, so that it may stand behind a class
            of ``pytorch_lightning``.
    """
    with suppress(ImportError):  # where it is not installed, nobody can run a Trainer of it
        return (getattr(importlib.import_module(f"{_OTHER}.callbacks"), name),)
    return ()
