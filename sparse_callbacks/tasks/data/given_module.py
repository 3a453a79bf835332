"""Anybody's LightningDataModule as the data of a run."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.tasks.given_arguments import refuse_unknown_arguments

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
EXAMPLE = "data=module data.module=my_package.MyDataModule"


def given_module(
    module: str | None = None,
    options: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_shape: list[int] | None = None,
    seed: int = 0,
) -> pl.LightningDataModule:
    """An object of a LightningDataModule, whose batches are (inputs, labels).

    Args:
        module: the dotted path of its class; it is looked for in the current folder too.
        options: its arguments by name.
        num_classes, input_shape: what `describe` would find, where it cannot.
        seed: its argument `seed`, where it has one that is not in `options`.

    Raises:
        ImportError: the class cannot be imported.
        ValueError: no class of LightningDataModule, one without loaders for training, validation and test, or arguments that it
            does not have or that are missing.
    """
    cls = module_class(module)
    given = dict(options or {})
    parameters = inspect.signature(cls).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        refuse_unknown_arguments("data.options", cls.__name__, given, list(parameters) or ["no arguments"])
    if "seed" in parameters:
        given.setdefault("seed", seed)
    try:
        inspect.signature(cls).bind(**given)
    except TypeError as error:
        missing = str(error)
        raise ValueError(
            f"data.module={module}: {missing}. Give what is missing, such as 'data.options={{root: FOLDER}}'."
        ) from None
    made: pl.LightningDataModule = cls(**given)
    return made


def module_class(module: str | None) -> type[pl.LightningDataModule]:
    """The class that a dotted path names.

    Raises:
        ImportError: it cannot be imported.
        ValueError: there is no path, or it does not name a LightningDataModule with all three loaders.
    """
    if module is None:
        raise ValueError(f"data=module takes a LightningDataModule of yours. Give its class, such as {EXAMPLE}.")
    if (written := _dotted(module)) != module:
        raise ValueError(f"data.module={module} is not the dotted path of a class. Did you mean data.module={written}?")
    package, _, name = module.rpartition(".")
    if not package:
        raise ValueError(
            f"data.module={module} has no package before the name of the class. Write for example {EXAMPLE}."
        )
    with _current_folder():
        try:
            holder = importlib.import_module(package)
        except Exception as error:  # a module may fail in any way while it is imported
            raise ImportError(
                f"data.module={module}: {package} cannot be imported ({with_class(error)}). It is looked for in "
                f"{Path.cwd()} and where Python finds packages."
            ) from error
    cls = getattr(holder, name, None)
    if not inspect.isclass(cls):
        classes = [key for key, value in vars(holder).items() if _is_data_module(value) and value.__module__ == package]
        there = f" Data modules there: {', '.join(classes)}." if classes else ""
        raise ValueError(f"data.module={module}: {package} has no class {name}.{there} Write for example {EXAMPLE}.")
    if not _is_data_module(cls):
        other = any(base.__module__.startswith("lightning.") for base in cls.__mro__)
        advice = "Import pytorch_lightning in place of lightning there" if other else "Derive it from that class"
        raise ValueError(f"data.module={module} is not a pytorch_lightning.LightningDataModule. {advice}.")
    if absent := [hook for hook in LOADERS if not is_overridden(hook, _blank(cls), pl.LightningDataModule)]:
        raise ValueError(
            f"data.module={module} has no {' and no '.join(absent)}, and a run trains, validates and tests. Write what is missing; "
            "a test_dataloader may return self.val_dataloader()."
        )
    return cls


def _dotted(module: str) -> str:
    """The path with dots of what may be that of a file: my_data.py:Photos, my_data/photos.py."""
    named = re.sub(r"\.py$", ".MyDataModule", re.sub(r"\.py[:.]", ".", module))
    return re.sub(r"[/\\:]+", ".", named).strip(".")


def _is_data_module(value: Any) -> TypeGuard[type[pl.LightningDataModule]]:
    return inspect.isclass(value) and issubclass(value, pl.LightningDataModule)


def _blank(cls: type[pl.LightningDataModule]) -> pl.LightningDataModule:
    """An object that is not initialised: Lightning asks objects, and its hooks are those of the class."""
    return object.__new__(cls)


@contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder is where modules are looked for last, as it is for `python -m`."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def describe(data: Any, given: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The shape of one input, (channels, height, width) or (features,), and the number of classes of a data module.

    They are its attributes `input_shape` and `num_classes`, if it has them after `setup("fit")`; the shape is else that of the first
    training batch, which leaves the random generators as they were.

    Args:
        data: the data module.
        given: the values of the group `data`, where `input_shape` and `num_classes` go first.

    Raises:
        ValueError: no number of classes, or a batch that is not (inputs, labels).
    """
    shape, classes = given.get("input_shape"), given.get("num_classes")
    shape = getattr(data, "input_shape", None) if shape is None else shape
    classes = getattr(data, "num_classes", None) if classes is None else classes
    if shape is None or classes is None:
        with isolate_rng():
            data.prepare_data()
            data.setup("fit")
            classes = getattr(data, "num_classes", None) if classes is None else classes
            shape = getattr(data, "input_shape", None) if shape is None else shape
            shape = _first_shape(data) if shape is None else shape
    if classes is None:
        raise ValueError(
            f"{type(data).__name__} does not say how many classes there are. Give data.num_classes=NUMBER, or the data module an "
            "attribute num_classes."
        )
    return tuple(shape), int(classes)


def _first_shape(data: Any) -> tuple[int, ...]:
    batch = next(iter(data.train_dataloader()), None)
    if batch is None:
        raise ValueError(
            f"{type(data).__name__} has no training batch: its train_dataloader gives nothing. Look at its data set, its sampler and "
            "drop_last."
        )
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise ValueError(
            f"A training batch of {type(data).__name__} is a {type(batch).__name__} and not (inputs, labels), two tensors, as the "
            "classifier of train.py takes them. For other tasks write a LightningModule of your own, with the method among the callbacks."
        )
    return tuple(batch[0].shape[1:])
