"""The network before its data is read, for the names of its parameters alone."""

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from sparse_callbacks.core.selection import select
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks.model_checks import without_weights

IMAGES = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32), None: (1, 8, 8)}
"""Shape of a sample by `data.name`; the digits have no such key."""
FEATURES = (500,)  # of a table, whose true number is in its file
OURS = "sparse_callbacks.tasks."


def refuse_unmatched_globs(cfg: DictConfig, method: SparsityCallback | None) -> None:
    """Refuse `method.include` and `method.exclude` that match no parameter, or leave none to be sparse.

    It concerns the networks and data of this package, whose parameters have the same names for data of any size; of others the
    method itself refuses when the run begins.

    Args:
        cfg: the configuration.
        method: the sparsity callback that was built from it; None for a dense run.

    Raises:
        ValueError: names the candidates.
    """
    if method is None or not (method.include or method.exclude):
        return
    if (model := _network_on_meta(cfg)) is not None:
        select(model, method.include, method.exclude, method.keep_dense)


def _network_on_meta(cfg: DictConfig) -> nn.Module | None:
    """The network with parameters that have names and shapes, and neither memory nor values; None where it cannot be made."""
    targets = [str(cfg[group].get("_target_")) for group in ("model", "data")]
    if not all(target.startswith(OURS) for target in targets):
        return None
    shape = FEATURES if ".tabular." in targets[1] else IMAGES.get(cfg.data.get("name"))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = instantiate(cfg.model, input_shape=shape, num_classes=10, **without_weights(cfg))
    except Exception:  # it does not fit the data, which is refused in the words of the data
        return None
    # as the module of the run holds it
    return nn.ModuleDict({"model": network})
