"""How many rows each layer sees in a training step, found out before the Trainer makes its loaders."""

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from itertools import islice
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.data import DataLoader, Dataset

from sparse_callbacks.core import data_pass
from sparse_callbacks.core.inspection import copied, run
from sparse_callbacks.core.storages.storage_timing import rows_of_layers
from sparse_callbacks.core.undisturbed import undisturbed
from sparse_callbacks.lightning.data_pass import unlogged, users_sampler
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.refusals import has_class_named


def seen_rows(trainer: Trainer, module: LightningModule) -> Mapping[str, int]:
    """Rows of the flattened input of each layer in one training step; none where nobody can know them yet.

    A batch of the training data is preferred to ``example_input_array``, which often has a single row. Everything is
    as before afterwards: the batch is fetched by a loader of its own, without workers, from a data set with indices.
    Where ``forward`` does not take the batch, ``training_step`` is run in automatic optimization, of a copy that knows no
    Trainer.

    Args:
        trainer: the Trainer, before it has made its loaders.
        module: its LightningModule.
    """
    with undisturbed(module), unlogged(module):
        for model, call in _calls(trainer, module):
            try:
                if found := rows_of_layers(model, call):
                    return found
            except Exception:  # whatever a forward pass raises on what it is not made for; the fit will raise it too
                continue
    return {}


def _calls(trainer: Trainer, module: LightningModule) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
    """Ways to run the module once, on the input that is most like a training step's first, each with the module it runs."""
    batch = _first_batch(trainer)
    if batch is not None:
        yield module, lambda: data_pass.call(module, _as_parameters(module, batch))
        if module.automatic_optimization and (twin := _without_trainer(module)) is not None:
            yield twin, lambda: twin.training_step(_as_parameters(module, batch), *batch_index(twin))
    example = module.example_input_array
    if example is not None:
        yield module, lambda: run(module, _as_parameters(module, example))


def _without_trainer(module: LightningModule) -> Any:
    """A copy whose step reaches neither the Trainer nor its loggers, and changes nothing of the user's module; None where
    it cannot be copied.

    It shares the Parameters, so that no second network is made, and data sets.
    """
    known: dict[int, Any] = {id(p): p for p in module.parameters()}
    for part in module.modules():
        known |= {id(v): v for v in vars(part).values() if isinstance(v, Dataset | DataLoader)}
        if (attached := vars(part).get("_trainer")) is not None:
            known[id(attached)] = None
    try:
        made = copied(module, known)
    except ValueError:
        return None
    return None if "training_step" in vars(made) else made  # a step of the instance belongs to the original


def batch_index(module: LightningModule) -> tuple[int, ...]:
    """The further argument of a ``training_step``, which may leave it out."""
    return (0,) if len(signature(module.training_step).parameters) > 1 else ()


def _first_batch(trainer: Trainer) -> Any:
    """A batch of the training data, whatever the order; None where it cannot be fetched without a trace."""
    source = trainer.fit_loop._data_source
    try:
        if not source.is_defined():
            return None
        loaders = source.dataloader()
        if has_class_named(loaders, ("CombinedLoader",)):
            loaders = loaders.iterables
        # of several loaders a step sees a batch of each, in the collection in which they were given
        return tree_map(_first_of, loaders)
    except Exception:  # not to be had: a stream, a custom sampler, a data set that only workers can read
        return None


def _first_of(loader: Any) -> Any:
    """The first batch of one loader in the order of its data set."""
    ordered = data_pass.in_order(loader, unwrap=users_sampler)
    if isinstance(ordered, DataLoader):
        ordered = DataLoader(
            ordered.dataset,
            batch_size=ordered.batch_size,
            sampler=list(islice(ordered.sampler, ordered.batch_size or 1)),
            collate_fn=ordered.collate_fn,
        )
    return next(iter(ordered))


def _as_parameters(module: nn.Module, batch: Any) -> Any:
    """The batch where the parameters are and, where it is of floats, of their type, which the precision is yet to set."""
    first = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return tree_map_only(
        torch.Tensor, lambda t: t.to(first.device, first.dtype if t.is_floating_point() else None), batch
    )
