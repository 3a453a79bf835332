"""The methods, found by their yaml in conf/method/, and what each promises."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sparse_callbacks import SparsityCallback

_FOUND = {path.stem: OmegaConf.load(path) for path in Path(__file__).parents[2].glob("conf/method/*.yaml")}
CONFIGS: dict[str, dict[str, Any]] = {
    name: OmegaConf.to_container(config) for name, config in sorted(_FOUND.items()) if "_target_" in config
}
METHODS = list(CONFIGS)
STEPS = 16  # of a short run: two epochs of eight batches

PROMISES = {
    "one network": "one network trains from the first step to the last, the same in every process",
    "planned counts": "masks have as many zeros as plan() announces",
    "several updates": "masks move several times in a short run",
    "updates at an interval": "updates go on at their interval until stop, also in a second fit",
    "growth": "updates grow connections",
    "grown weights start from zero": "a grown weight is zero until its first step",
    "pruned weights rest": "a pruned weight has no value besides zero, and no step moves it",
    "any layer": "weights of every supported layer can be sparse",
}


def _settings(name: str) -> ModuleType:
    try:
        return import_module(f"contract.settings.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"conf/method/{name}.yaml has no tests/contract/settings/{name}.py. Write one with "
            "short_run(), gradient_rule() and promises_not_made, like the others there."
        ) from error


SETTINGS = {name: _settings(name) for name in METHODS}


def method(name: str, **changes: Any) -> SparsityCallback:
    """The callback of ``conf/method/<name>.yaml`` for a short run; ``changes`` that this method does not take are left
    out."""
    config = CONFIGS[name]
    short = SETTINGS[name].short_run(**{k: changes.pop(k) for k in ("sparsity",) if k in changes})
    return instantiate(config | short | {k: v for k, v in changes.items() if k in config}, _convert_="all")


def promises(name: str, promise: str) -> bool:
    """Whether the method makes the promise."""
    assert promise in PROMISES
    return promise not in SETTINGS[name].promises_not_made


def masks_gradients(name: str) -> bool:
    """Gradients of pruned weights are zero when somebody reads them."""
    mask = torch.tensor([True, False])
    return not SETTINGS[name].gradient_rule(mask, torch.ones(2))[~mask].any()


STEADY = [name for name in METHODS if promises(name, "one network")]
MASKED = [name for name in STEADY if promises(name, "planned counts")]


def moves(name: str) -> bool:
    """The method has several updates in a short run."""
    return promises(name, "several updates")


every_method = pytest.mark.parametrize("name", METHODS)
every_steady_method = pytest.mark.parametrize("name", STEADY)
every_masked_method = pytest.mark.parametrize("name", MASKED)
