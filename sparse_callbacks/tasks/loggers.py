"""Loggers of a run: W&B that also works without an account, where the curves lie, how runs end."""

import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger

from sparse_callbacks.tasks.summary import relative


def wandb_mode(environment: dict[str, str]) -> str:
    """The mode of W&B: WANDB_MODE where it is set, else "online" with a login and "offline" without one.

    A login is a key in the environment or in the netrc file. W&B itself would ask for one on the terminal, so a run on
    a machine without an account would hang.
    """
    if environment.get("WANDB_MODE"):
        return environment["WANDB_MODE"]
    has_key = environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE")
    return "online" if has_key or _has_login_in_netrc(environment) else "offline"


def _has_login_in_netrc(environment: dict[str, str]) -> bool:
    """Whether the netrc file that W&B would read has an entry for its host."""
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    named = environment.get("NETRC")
    if named:
        paths = [Path(named)]
    else:
        home = Path(environment.get("HOME", "~")).expanduser()
        paths = [home / ".netrc", home / "_netrc"]
    for path in paths:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            # an absent or broken file is not a login
            continue
    return False


def wandb_logger(save_dir: str, project: str, name: str | None = None, **options: Any) -> WandbLogger:
    """A W&B run in the mode of `wandb_mode`, whose x axis is trainer/global_step, the number of optimizer steps.

    Args:
        save_dir: the folder that W&B writes into.
        project: the name of the W&B project.
        name: the name of the run; None lets W&B choose one.
        options: further arguments of Lightning's `WandbLogger`.

    Raises:
        ImportError: the package wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ImportError(
            "logger=wandb needs the package wandb, which is not installed. "
            "Install it with pip install 'sparse-callbacks[train]', or choose logger=csv."
        ) from None
    mode = wandb_mode(dict(os.environ))
    settings = wandb.Settings(silent=mode != "online", console="off")
    logger = WandbLogger(project=project, name=name, save_dir=save_dir, mode=mode, settings=settings, **options)
    # Lightning passes this argument on, and wandb warns in every run that it is deprecated
    logger._wandb_init.pop("anonymous", None)
    return logger


def place(logger: Logger) -> tuple[str, str]:
    """The name of a logger and the folder or address of its curves; for an offline W&B run, how to upload it."""
    if isinstance(logger, WandbLogger):
        mode = str(logger.experiment.settings.mode)
        if mode == "offline":
            return "wandb", f"offline; to upload it: wandb sync {relative(Path(logger.experiment.dir).parent)}"
        if mode == "online":
            return "wandb", str(logger.experiment.url)
        return "wandb", mode
    name = type(logger).__name__.removesuffix("Logger").lower()
    return name, relative(Path(logger.log_dir or logger.save_dir or "."))


def finish(loggers: Iterable[Logger], failed: bool) -> None:
    """End the W&B runs of a job, so that the next job of the same process starts a run of its own.

    Args:
        loggers: all loggers of the job.
        failed: whether the job ended with an error, which the runs then show.
    """
    for logger in loggers:
        # the private attribute, since `experiment` would start a run that was never used
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger._experiment.finish(exit_code=int(failed))
