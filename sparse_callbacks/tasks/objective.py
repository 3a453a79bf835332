"""What a run gives back to a sweeper: the metrics that the root key `objective` names."""

from collections.abc import Mapping, Sequence

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig


def objective_names(cfg: DictConfig) -> str | list[str]:
    """The metrics that a sweeper optimizes, as `objective` names them.

    Raises:
        ValueError: it is neither the name of a metric nor a list of different names.
    """
    given = cfg.get("objective", "val/acc")
    names = list(given) if isinstance(given, ListConfig | list | tuple) else [given]
    known = all(isinstance(name, str) and name.strip() for name in names)
    if not names or not known or len(set(names)) < len(names):
        raise ValueError(
            f"objective={given!r} names no metric of a run. Give one, such as objective=val/acc, or several, such as "
            "'objective=[val/acc,sparsity/model]', each once."
        )
    return names if isinstance(given, ListConfig | list | tuple) else names[0]


def objective_values(
    metrics: Mapping[str, float], names: str | Sequence[str], required: bool
) -> float | tuple[float, ...] | None:
    """The value of one metric, or those of several in their order.

    Args:
        metrics: the metrics of a run, as in its metrics.json.
        names: the names of `objective_names`.
        required: whether somebody reads them, see `is_read`; else None stands for a metric that the run does not have.

    Raises:
        ValueError: the run has no metric of that name, and one is required.
    """
    absent = [name for name in ([names] if isinstance(names, str) else names) if name not in metrics]
    if absent and required:
        raise ValueError(
            f"objective={', '.join(absent)} is not among the metrics of the run: {', '.join(sorted(metrics))}. The run itself "
            "is complete, and its metrics.json is written."
        )
    if absent:
        return None
    return metrics[names] if isinstance(names, str) else tuple(metrics[name] for name in names)


def is_read(hydra_config: HydraConf) -> bool:
    """Whether a sweeper reads what a job gives back: Hydra's own, which tries every combination, does not."""
    sweeper = str(hydra_config.sweeper.get("_target_", ""))
    return hydra_config.mode == RunMode.MULTIRUN and not sweeper.endswith(".BasicSweeper")
