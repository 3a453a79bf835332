"""Loggers: W&B without an account, and the closing of a job's run."""

import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger, WandbLogger

from sparse_callbacks.tasks.summary import relative


def wandb_mode(environment: dict[str, str]) -> str:
    """WANDB_MODE where it is set, "online" with a login (key in the environment or in the netrc file), else "offline".

    W&B itself would ask on the terminal where neither is there.
    """
    if environment.get("WANDB_MODE"):
        return environment["WANDB_MODE"]
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(environment):
        return "online"
    return "offline"


def _in_netrc(environment: dict[str, str]) -> bool:
    home = Path(environment.get("HOME", "~")).expanduser()
    named = environment.get("NETRC")
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def wandb_logger(save_dir: str, project: str, name: str | None = None, **options: Any) -> WandbLogger:
    """W&B run in `save_dir`, in the mode of `wandb_mode`; its curves have trainer/global_step (optimizer steps) as x axis."""
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
    # Lightning passes it on, and wandb warns of it in every run
    logger._wandb_init.pop("anonymous", None)
    return logger


def place(logger: Logger) -> tuple[str, str]:
    """Name of a logger and where its curves lie; for an offline W&B run the command that uploads it."""
    if isinstance(logger, WandbLogger):
        mode = str(logger.experiment.settings.mode)
        if mode == "offline":
            return "wandb", f"offline; to upload it: wandb sync {relative(Path(logger.experiment.dir).parent)}"
        return "wandb", str(logger.experiment.url) if mode == "online" else mode
    return type(logger).__name__.removesuffix("Logger").lower(), relative(Path(logger.log_dir or logger.save_dir or "."))


def finish(loggers: Iterable[Logger], failed: bool) -> None:
    """End the W&B runs of a job, so that the next job of the process starts its own."""
    for logger in loggers:
        # an experiment that was never started must not be started to be ended
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger._experiment.finish(exit_code=int(failed))
