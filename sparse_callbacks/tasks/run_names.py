"""Names, groups and tags of runs, by which a dashboard of many runs can be read."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from sparse_callbacks.core.distributions import decides_total
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks.recorded_config import settings, target_sparsity

NOT_OF_THE_RUN = (
    *("seed", "output_dir", "ckpt_path", "checkpoint_every", "logger"),
    *("initial_weights", "objective", "threads", "report", "dense_run", "curvature"),
)
"""Root keys that may differ between runs of one group: seeds (also by the weights of a dense run of each seed), places of
files, and what has no part in what comes out."""


SPOKEN = {
    "ChannelPruning": "channels",
    "ConstrainedL0": "l0",
    "EarlyCroP": "early_crop",
    "ParallelGaP": "gap_parallel",
    "PruneAtStart": "{score}",
    "SupTickets": "sup_tickets",
}
"""Classes whose name in conf/method is not the name of the class in small letters, but another one or that of an argument."""


def method_name(method: SparsityCallback | None) -> str:
    """The name of a method, as in conf/method; "dense" without one."""
    if method is None:
        return "dense"
    name = type(method).__name__
    return SPOKEN.get(name, name.lower()).format(**vars(method))


def part_name(part: Mapping[str, Any]) -> str:
    """What a group of the configuration chose: its `name` where it has one (resnet18, cifar10), else its function."""
    return str(part.get("name") or part["_target_"].rpartition(".")[2])


def target_text(method: SparsityCallback | None) -> str:
    """The target as it was asked for: a sparsity, a budget, or what decides the total, an epsilon or an object by its class;
    empty where a file decides or nothing does."""
    if method is None:
        return ""
    shared = method.distribution
    if decides_total(shared):
        named = "epsilon" if isinstance(shared, Mapping) else type(shared).__name__.lower()
        return shared if isinstance(shared, str) else named
    sparsity = target_sparsity(method)
    asked = getattr(method, "budget", None) if sparsity is None else sparsity
    return "" if asked is None else f"{asked:g}"


def setting_name(cfg: DictConfig, method: SparsityCallback | None) -> str:
    """Method, target and model, such as `rigl-0.9-mlp`: what distinguishes the runs of one chart."""
    parts = [method_name(method), target_text(method), part_name(cfg.model)]
    return "-".join(part for part in parts if part)


def run_name(cfg: DictConfig, method: SparsityCallback | None) -> str:
    """Such as `rigl-0.9-mlp-s0`."""
    return f"{setting_name(cfg, method)}-s{cfg.seed}"


def group_name(recorded: DictConfig, method: SparsityCallback | None) -> str:
    """Such as `rigl-0.9-mlp-digits-1c9f3a`: equal for two runs where they differ by nothing but the seed.

    The last six digits are of a hash of the whole configuration without seeds and places of files.

    Args:
        recorded: the configuration as it runs, see `recorded_config.as_run`.
        method: the sparsity callback; None for a dense run.
    """
    kept = {key: value for key, value in settings(recorded).items() if key not in NOT_OF_THE_RUN}
    for part in ("method", "data"):
        kept[part] = _without_seeds(kept[part] or {})
    # the bar on the terminal has no part in what comes out
    kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key != "enable_progress_bar"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:6]
    return f"{setting_name(recorded, method)}-{part_name(recorded.data)}-{digest}"


def _without_seeds(part: Mapping[str, Any]) -> dict[str, Any]:
    """A group of the configuration without its seed, and without those of the groups in it."""
    return {k: _without_seeds(v) if isinstance(v, Mapping) else v for k, v in part.items() if k != "seed"}


def tags(cfg: DictConfig, method: SparsityCallback | None) -> list[str]:
    """Method, model and data, by which runs are filtered, and whether a run goes on from a checkpoint."""
    resumed = ["resumed"] if cfg.ckpt_path is not None else []
    return [method_name(method), part_name(cfg.model), part_name(cfg.data), *resumed]


def for_wandb(recorded: DictConfig, method: SparsityCallback | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `loggers.wandb_logger` that name a run, without those that W&B's own variables name in `environment`."""
    given = {"name": run_name(recorded, method), "group": group_name(recorded, method), "tags": tags(recorded, method)}
    variables = {"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "tags": "WANDB_TAGS"}
    return {key: value for key, value in given.items() if not environment.get(variables[key])}
