"""What a configuration is refused for before data is read or loggers are started."""

import pydoc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from sparse_callbacks.core.similar_names import close
from sparse_callbacks.tasks import build
from sparse_callbacks.tasks.data.module import refuse_batch_size
from sparse_callbacks.tasks.given_arguments import group_values, refuse_wrong_arguments
from sparse_callbacks.tasks.initial_weights import refuse_missing
from sparse_callbacks.tasks.model_checks import REFUSED_EARLY, of_resumed

TESTED = ("last", "best")  # values of the root key `test`
GROUPS = {"model": "model=mlp", "data": "data=digits", "optim": "optim=sgd", "trainer": "trainer=cpu"}
"""Groups that every run has a choice of, each with an example."""
LARGEST_SEED = 2**32 - 1
KEYS = (
    *("seed", "sparsity", "ckpt_path", "initial_weights", "output_dir", "checkpoint_every", "curvature"),
    *("early_stopping", "test", "slim", "onnx", "objective", "threads", "report", "dense_run"),
    *("method", "schedule", "model", "data", "optim", "trainer", "logger", "experiment", "shrinkbench", "hydra"),
)
"""Keys of the root that somebody reads."""


PATHS = ("data.root", "data.path", "model.weights", "ckpt_path", "initial_weights", "output_dir", "dense_run")
"""Keys of files and folders."""


def take_paths_as_typed(cfg: DictConfig) -> None:
    """Turn files and folders whose names are whole numbers, which Hydra reads as such (``data.root=2024``), into text, and ~ into
    the folder that it stands for, which shells leave as it is behind "=".
    """
    for key in PATHS:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int) and not isinstance(value, bool):
            OmegaConf.update(cfg, key, str(value))
        elif isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, str(Path(value).expanduser()))


def refuse_file_as_folder(folder: Path) -> None:
    """Refuse a folder of the run that is a file.

    Raises:
        ValueError: it is one.
    """
    if folder.is_file():
        raise ValueError(f"output_dir={folder} is a file. Give a folder, which is made where it is not there.")


def check_seeds(cfg: DictConfig) -> None:
    """Refuse seeds that no generator takes.

    Raises:
        ValueError: a seed is not a whole number from 0 to 2**32 - 1.
    """
    for key in ("seed", "data.seed", "method.seed"):
        seed = OmegaConf.select(cfg, key, default=0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
            raise ValueError(
                f"{key}={seed!r} is not a whole number from 0 to {LARGEST_SEED}. Give for example {key}=0."
            )


def set_threads(cfg: DictConfig) -> None:
    """Let torch use the number of threads of the root key `threads`; null leaves it as it is.

    Raises:
        ValueError: it is not a whole number from 1 on.
    """
    # configurations of older versions lack the key
    threads = cfg.get("threads")
    if threads is None:
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(
            f"threads={threads!r} is not a number of threads. Give 1 or more, or null for torch's own choice."
        )
    torch.set_num_threads(threads)


def check_choices(cfg: DictConfig) -> None:
    """Refuse values that cannot work with any data.

    Raises:
        TypeError: a value is of another type than what reads it takes.
        ValueError: a root key that nobody reads, a group without a choice, a value out of range, or a GPU that is not there.
    """
    _refuse_unread_keys(cfg)
    for group, example in GROUPS.items():
        if not isinstance(cfg.get(group), DictConfig):
            raise ValueError(f"The run has no choice of {group}. Give one, such as {example}.")
    if cfg.test not in TESTED:
        raise ValueError(
            f"test={cfg.test!r} does not name a network. "
            "Use test=last, or test=best for the best epoch by validation accuracy."
        )
    check_seeds(cfg)
    _refuse_wrong_counts(cfg)
    build.optim_of(cfg)
    read = of_resumed(cfg)
    _refuse_wrong_group(cfg, "model", {"input_shape": (1,), "num_classes": 2, **read})
    if (refuse := REFUSED_EARLY.get(str(cfg.model.get("_target_")))) is not None:
        refuse(**group_values(cfg, "model"), **read)
    _refuse_wrong_group(cfg, "data", {})
    refuse_batch_size(cfg.data.get("batch_size", 1))
    refuse_wrong_arguments("trainer", pl.Trainer, group_values(cfg, "trainer"))
    for key, whole in (("max_epochs", "epochs"), ("max_steps", "optimizer steps")):
        if cfg.trainer.get(key) == 0:
            raise ValueError(
                f"trainer.{key}=0 trains nothing. Give a number of {whole} of 1 or more, e.g. trainer.{key}=30."
            )
    if cfg.trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator}, but torch sees no GPU. "
            "Use trainer=cpu, or install a torch build for your GPU."
        )
    logger = cfg.get("logger")
    if logger is not None and not isinstance(logger, Mapping | DictConfig):
        raise ValueError(f"logger={logger} does not choose loggers. Give e.g. logger=csv, or logger=[] for none.")


def check_files(cfg: DictConfig) -> None:
    """Refuse files that are not there.

    Raises:
        FileNotFoundError: `initial_weights` names a file that is not there.
    """
    given = cfg.get("initial_weights")
    # a run that goes on has its weights from its own checkpoint
    if given is not None and cfg.ckpt_path is None:
        refuse_missing(Path(str(given)))


def _refuse_unread_keys(cfg: DictConfig) -> None:
    text = ""
    for key in map(str, cfg):
        if key in KEYS:
            continue
        # a key of somebody's own preset may be there for the others to point at
        text = text or OmegaConf.to_yaml(cfg)
        if f"${{{key}}}" not in text and f"${{{key}." not in text and (found := close(key, KEYS)):
            raise ValueError(f"{key} is not a key, and nobody reads it. Did you mean {found}={cfg[key]}?")


def _refuse_wrong_counts(cfg: DictConfig) -> None:
    for key, counted in (
        ("checkpoint_every", "optimizer steps between checkpoints"),
        ("curvature", "optimizer steps between measurements"),
        ("early_stopping", "epochs to wait"),
    ):
        value = cfg.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{key}={value!r} is not a number of {counted}. Give 1 or more, or null for none.")
    for key in ("slim", "onnx"):  # configurations of older versions lack the second one
        if not isinstance(cfg.get(key, False), bool):
            raise ValueError(f"{key}={cfg[key]!r} is not known. Give {key}=true or {key}=false.")
    if cfg.get("onnx") and not cfg.slim:
        raise ValueError("onnx=true exports the slim network, and slim=false makes none. Give slim=true beside it.")


def _refuse_wrong_group(cfg: DictConfig, group: str, supplied: Mapping[str, Any]) -> None:
    """Compare a group with the arguments of its target, where that is one of this package: of somebody else's the
    annotations may be there for the reader alone.
    """
    target = str(cfg[group].get("_target_"))
    if target.startswith("sparse_callbacks."):
        refuse_wrong_arguments(group, pydoc.locate(target), group_values(cfg, group), supplied)  # type: ignore[arg-type]
