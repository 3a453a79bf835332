"""The configuration that ran, for loggers and the run folder: one sparsity, and when the masks move."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.utilities import rank_zero_only

from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.distributions import decides_total
from sparse_callbacks.core.files import replacing
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks import loggers

ENDLESS = 2**31
"""Steps from which on `until` stands for the end of the run, whenever that is."""


def target_sparsity(method: SparsityCallback | None) -> float | None:
    """The sparsity that a run ends at, whatever its method calls it.

    Zero for a dense run, one minus the density for gates, the end of a curve for gradual pruning. None where it is not known
    (yet): the layers, the weights or a file decide it, which are looked at when training starts; or a budget, which says nothing
    about the number of zeros.

    Args:
        method: the sparsity callback, before or during a fit; None for a dense run.
    """
    if method is None:
        return 0.0
    if isinstance(getattr(method, "density", None), Mapping) and not method.entries:
        return None  # one density for each layer, and no layer is known
    if decides_total(method.distribution):
        return round(method.plan().total, 6) if method.entries else None
    # a budget has no target and gives 0, as do masks of a file before anybody has looked at them
    if method.target_sparsity == 0 and not (method.plans_counts and method.sparsity == 0):
        return None
    return round(method.target_sparsity, 10)  # 1 - 0.33 is 0.6699999999999999


def as_run(cfg: DictConfig, method: SparsityCallback | None) -> DictConfig:
    """A copy of a configuration with the same sparsity in both of its places, the root key and the group `method`.

    Args:
        cfg: the configuration, composed from conf/train.yaml.
        method: the sparsity callback that was built from it; None for a dense run.
    """
    recorded = cfg.copy()
    sparsity = target_sparsity(method)
    recorded.sparsity = sparsity
    part = masking_part(recorded)
    own = part.get("sparsity")
    # a curve such as "linear(0.5, 0.9)" says more than its end
    if sparsity is not None and "sparsity" in part and not isinstance(own, str):
        part.sparsity = sparsity
    return recorded


def masking_part(cfg: DictConfig) -> DictConfig:
    """The arguments that concern masks: the group `method`, or in it `base` where one method is around another."""
    method: DictConfig = cfg.method
    base = method.get("base")
    return base if isinstance(base, DictConfig) else method


def settings(cfg: DictConfig) -> dict[str, Any]:
    """What loggers are told: plain values, without a sparsity as long as it is not known."""
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    if found["sparsity"] is None:
        del found["sparsity"]
    return {str(key): value for key, value in found.items()}


def calendar_of(calendar: Calendar) -> dict[str, int]:
    """When the masks move, in optimizer steps: every, start, stop, and until where updates go on behind stop."""
    known = {"every": calendar.every, "start": calendar.start, "stop": calendar.stop}
    if calendar.until is not None and calendar.until < ENDLESS:
        known["until"] = calendar.until
    return known


def hydra_file() -> Path | None:
    """The file that Hydra has written the configuration of the current job into; None where it writes none."""
    job = HydraConfig.get()
    if job.output_subdir is None:
        return None
    path = Path(job.runtime.output_dir) / job.output_subdir / "config.yaml"
    return path if path.is_file() else None


@rank_zero_only
def correct_file(path: Path, recorded: DictConfig) -> None:
    """Write the sparsity that runs into Hydra's file, which was written before anybody knew it.

    A run that is started from the file again must not be refused, so the root key stays as it was given where the method has
    no argument of that name and value (gates, curves, a dense run).

    Args:
        path: the file.
        recorded: what `as_run` gave.
    """
    saved = OmegaConf.load(path)
    sparsity = recorded.sparsity
    if sparsity is None or not isinstance(saved, DictConfig) or masking_part(recorded).get("sparsity") != sparsity:
        return
    saved.sparsity = masking_part(saved).sparsity = sparsity
    with replacing(path) as beside:
        OmegaConf.save(saved, beside)


def fit_recorder(method: SparsityCallback | None) -> pl.Callback:
    """A callback that adds to the configuration in the loggers what is known only when training starts: the interval and the
    other times of the updates, resolved against the length of the run, and a sparsity that a file or an epsilon decides. List
    it after the method.
    """

    def record(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        known: dict[str, Any] = {}
        if method is not None and method.calendar is not None:
            known["calendar"] = calendar_of(method.calendar)
        sparsity = target_sparsity(method)
        if sparsity is not None:
            known["sparsity"] = sparsity
        loggers.add_settings(trainer.loggers, known)

    return LambdaCallback(on_train_start=record)
