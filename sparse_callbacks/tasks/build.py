"""Builds the parts of a run from its composed configuration.

Whatever is refused here is refused before the first batch.
"""

import inspect
import logging
import os
import re
import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_class, instantiate
from lightning_utilities.core import rank_zero
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, LearningRateMonitor
from pytorch_lightning.loggers import Logger

from sparse_callbacks import methods
from sparse_callbacks.core.checkpoint_file import read_mapping
from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import DEFAULT_SPARSITY, Options
from sparse_callbacks.core.nm_masks import nm_pattern
from sparse_callbacks.core.schedules import with_curve
from sparse_callbacks.lightning.at_target import BestAtTarget, EarlyStoppingAtTarget
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.lightning.curvature_monitor import CurvatureMonitor
from sparse_callbacks.lightning.resumed_file import refuse_other_parts
from sparse_callbacks.lightning.sparsity_report import SparsityReport
from sparse_callbacks.tasks import model_checks, recorded_config, resolvers, run_names
from sparse_callbacks.tasks.classifier import Classifier, Optim
from sparse_callbacks.tasks.data.given_module import describe
from sparse_callbacks.tasks.given_arguments import group_values, refuse_unknown_arguments, refuse_wrong_arguments
from sparse_callbacks.tasks.progress_bar import ShortProgressBar
from sparse_callbacks.tasks.run_state import RunState
from sparse_callbacks.tasks.safe_stop import SafeStop

resolvers.register()  # whoever builds from a configuration has to read it


def method_arguments(
    method: Mapping[str, Any], defaults: Mapping[str, Any], schedulable: str | None, sparsity: Any, curve: str | None
) -> dict[str, Any]:
    """Constructor arguments of the method, with the root key `sparsity` and the group `schedule` applied.

    Args:
        method: the group `method` of the configuration, with its `_target_`.
        defaults: default values of the constructor by argument name.
        schedulable: the name of the constructor argument that may be a schedule; None if there is no such argument.
        sparsity: the root key `sparsity`; None keeps the method's own value.
        curve: the name of the curve in the group `schedule`; None keeps the method's own curve.

    Returns:
        Values by argument name, still with `_target_`.

    Raises:
        ValueError: a value that the method does not have an argument for, or two values for one argument.
    """
    name = str(method["_target_"]).rpartition(".")[2]
    arguments = dict(method)
    if sparsity is not None:
        own = arguments.get("sparsity")
        # the group spells out the default, as configurations of older versions do, so only another value was asked for
        if own is not None and own not in (defaults.get("sparsity"), DEFAULT_SPARSITY, sparsity):
            raise ValueError(
                f"sparsity={sparsity} and method.sparsity={own} both set the target of {name}. Give one of them."
            )
        arguments["sparsity"] = sparsity
    if curve is not None:
        if schedulable is None:
            raise ValueError(
                f"schedule={curve}: {name} has no number that moves over the run. "
                f"Use schedule=default, or a method that has one ({', '.join(_scheduled_methods())})."
            )
        number = arguments.get(schedulable)
        if number is None:
            number = defaults.get(schedulable)
        if number is None and schedulable == "sparsity":  # that of a pattern, or of all methods
            asked = nm_pattern(arguments.get("pattern"))
            number = DEFAULT_SPARSITY if asked is None else asked.sparsity
        # a bool is a Real for Python, and a schedule written out ("cosine(0.2)") has chosen its curve already
        if isinstance(number, bool) or not isinstance(number, Real):
            raise ValueError(
                f"schedule={curve} and {schedulable}={number!r} both choose a curve. "
                f"Use schedule=default, or give {schedulable} as a number."
            )
        arguments[schedulable] = with_curve(curve, float(number), rising=schedulable == "sparsity")
    return arguments


def _scheduled_methods() -> list[str]:
    """Sorted names of the methods with a number that may be a schedule."""
    return sorted(name for name in methods.__all__ if getattr(methods, name).schedulable is not None)


def build_method(cfg: DictConfig) -> SparsityCallback | None:
    """The sparsity callback of the group `method`; None for `method=none`.

    Raises:
        ValueError: sparsity or schedule for a dense run, and whatever `method_arguments` or the method refuses.
    """
    method = OmegaConf.to_container(cfg.method, resolve=True) or {}
    assert isinstance(method, dict)
    curve = None if cfg.get("schedule") is None else cfg.schedule.get("curve")
    if "_target_" not in method:
        if cfg.sparsity is not None:
            raise ValueError(
                f"sparsity={cfg.sparsity}, but method=none trains dense and has no sparsity. "
                "Choose a method, e.g. method=rigl, or leave sparsity out."
            )
        if curve is not None:
            raise ValueError(
                f"schedule={curve}, but method=none trains dense and schedules nothing. "
                "Choose a method, e.g. method=rigl, or leave schedule out."
            )
        return None
    return _method_of({str(key): value for key, value in method.items()}, cfg.sparsity, curve)


def _method_of(group: Mapping[str, Any], sparsity: Any, curve: str | None) -> SparsityCallback:
    """The callback of a group of arguments with its `_target_`; of a method around another one (`base`) the root keys go to
    that one.
    """
    cls: Any = get_class(str(group["_target_"]))
    if isinstance(base := group.get("base"), Mapping):
        if "_target_" not in base:
            raise ValueError(
                f"method@method.base=none, and {cls.__name__} trains by the method in its base. Choose one, e.g. "
                "method@method.base=rigl."
            )
        own = {key: value for key, value in group.items() if key not in ("_target_", "seed")}
        callback: SparsityCallback = cls(**{**own, "base": _method_of(base, sparsity, curve)})
        return callback
    parameters = inspect.signature(cls).parameters.values()
    # read from the signature, so that a method that is added later needs no entry here
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    arguments = method_arguments(group, defaults, cls.schedulable, sparsity, curve)
    del arguments["_target_"]
    for name, value in arguments.items():  # an object, such as a distribution that sees the model
        if isinstance(value, dict) and "_target_" in value:
            arguments[name] = instantiate(value)
    try:
        made: SparsityCallback = cls(**arguments)
    except TypeError as error:
        if match := re.search(r"has no argument (\w+)=", str(error)):
            refuse_unknown_arguments("method", cls.__name__, [match[1]], argument_names(cls, Options))
        raise
    return made


def build_module(cfg: DictConfig, data: pl.LightningDataModule) -> Classifier:
    """The network for the data's shape and classes, with its optimizer.

    The checkpoint of a run that goes on holds its weights, so those that it began with are not read again.
    """
    input_shape, num_classes = describe(data, group_values(cfg, "data"))
    model = instantiate(cfg.model, input_shape=input_shape, num_classes=num_classes, **model_checks.of_resumed(cfg))
    return Classifier(model, num_classes, optim_of(cfg))


def optim_of(cfg: DictConfig) -> Optim:
    """The settings of the optimizer in the group `optim`.

    Raises:
        TypeError, ValueError: settings that `Optim` does not have, or values that it refuses.
    """
    options = group_values(cfg, "optim")
    refuse_wrong_arguments("optim", Optim, options)
    if isinstance(options.get("milestones"), list):
        options["milestones"] = tuple(options["milestones"])
    return Optim(**options)


def build_loggers(cfg: DictConfig, method: SparsityCallback | None) -> list[Logger]:
    """One logger for each entry of the group `logger`; a W&B run that was given no name, group or tags gets those of
    `run_names`.

    Args:
        cfg: the configuration as it runs, see `recorded_config.as_run`.
        method: the sparsity callback; None for a dense run.
    """
    # `logger.wandb=null` on the command line takes a logger out of the group
    entries = [dict(entry) for entry in (cfg.get("logger") or {}).values() if entry is not None]
    for entry in entries:
        if str(entry["_target_"]).endswith(".wandb_logger"):
            named = run_names.for_wandb(cfg, method, dict(os.environ))
            entry |= {key: value for key, value in named.items() if entry.get(key) is None}
    return [instantiate(entry) for entry in entries]


def build_callbacks(
    cfg: DictConfig,
    method: SparsityCallback | None,
    folder: Path,
    logged: bool,
    report: SparsityReport | None = None,
) -> list[Callback]:
    """All callbacks of a run, in the order in which Lightning calls them.

    Args:
        cfg: the whole configuration.
        method: the sparsity callback; None for a dense run.
        folder: the folder of the checkpoints.
        logged: whether the run has a logger, which the monitor of the learning rate needs.
        report: the callback that records the run; None where nobody does.
    """
    # the method comes first, so that what follows sees the masks and weights that it leaves
    callbacks: list[Callback] = [] if method is None else [method]
    if report is not None:
        callbacks.append(report)
    if cfg.get("curvature") is not None:
        callbacks.append(CurvatureMonitor(every=cfg.curvature))
    # sparsity callbacks save the gradients of an unfinished accumulation window themselves
    callbacks.append(RunState(gradients=method is None))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ShortProgressBar())
    if logged:
        callbacks += [LearningRateMonitor(logging_interval="step"), recorded_config.fit_recorder(method)]
    if cfg.early_stopping is not None:
        callbacks.append(EarlyStoppingAtTarget("val/acc", "max", cfg.early_stopping))
    callbacks.append(BestAtTarget("val/acc", "max", folder))
    callbacks.append(SafeStop(folder / "last.ckpt", cfg.checkpoint_every))
    return callbacks


def build_trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """The Trainer of the group `trainer`."""
    hide_lightning_notices()
    # an empty list of loggers would make Lightning choose one itself
    trainer: pl.Trainer = instantiate(
        cfg.trainer, callbacks=callbacks, logger=loggers or False, default_root_dir=cfg.output_dir
    )
    return trainer


UNASKED = (
    "GPU available: ",
    "TPU available: ",
    "`Trainer.fit` stopped: `max_epochs=",
    "`Trainer.fit` stopped: `max_steps=",
)
"""How notices of Lightning begin that a run goes without; the last two would stand behind the bar, in its line."""


def hide_lightning_notices() -> None:
    """Keep out of the terminal Lightning's tips, its inventory of the machine, the news that a run has ended as it was asked to,
    a warning of its own use of a deprecated torch function, and one of small data, whose steps have their rows all the same.
    """
    # the one logger of all notices; filters are compared by identity, so the second run of a process adds nothing
    rank_zero.log.addFilter(_is_news)
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "Tip:" not in text and not text.startswith(UNASKED)


def checkpoint_to_resume(cfg: DictConfig) -> str | None:
    """The absolute path of the file that `ckpt_path` names; None for a new run.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is a folder.
    """
    if cfg.ckpt_path is None:
        return None
    path = Path(cfg.ckpt_path).absolute()
    if path.is_dir():
        raise ValueError(f"ckpt_path={cfg.ckpt_path} is a folder. Give a checkpoint in it, such as last.ckpt.")
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path} is not there (looked at {path}). Give the file that the stopped run printed; "
            "a run keeps it as checkpoints/last.ckpt in its folder."
        )
    return str(path)


def refuse_sparse_checkpoint(path: str | None, method: SparsityCallback | None) -> None:
    """Refuse a file that is not a checkpoint, and to go on from a sparse run with a dense one: without masks its zeros would
    train away unnoticed. (What a method needs of a checkpoint it looks at itself.)

    Raises:
        ValueError: it is not a whole checkpoint; or it holds masks, and there is no method.
    """
    if path is None:
        return
    found = read_mapping(Path(path), "Give ckpt_path= another checkpoint of the run.")
    refuse_other_parts(found, path)
    sparse = [key for key, state in found["callbacks"].items() if isinstance(state, Mapping) and "masks" in state]
    if sparse and method is None:
        raise ValueError(
            f"ckpt_path={path} is of a sparse run ({sparse[0]}), and method=none would train its zeros away. "
            "Give the method and the arguments of that run, or method=static method.initial_mask=FILE to hold its "
            "mask in a new run."
        )
