"""Loggers of a run: W&B that also works without an account, where the curves lie, how runs end."""

import netrc
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.core.saving import save_hparams_to_yaml
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from sparse_callbacks.core.files import replacing
from sparse_callbacks.tasks.summary import relative

COMPARED = ("val/acc", "test/acc", "slim/test/acc", "sparsity/total", "sparsity/model")
"""Metrics that are columns of TensorBoard's table of hyperparameters."""


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


def wandb_logger(
    save_dir: str, project: str, name: str | None = None, log_model: bool | str = False, **options: Any
) -> WandbLogger:
    """A W&B run in the mode of `wandb_mode`, whose x axis is trainer/global_step, the step numbers of Lightning's rows.

    What the run prints is kept in it as well (output.log).

    Args:
        save_dir: the folder that W&B writes into.
        project: the name of the W&B project.
        name: the name of the run; None lets W&B choose one.
        log_model: whether an online run keeps the best checkpoint, the report and the slim network as artifacts; "all"
            keeps each best checkpoint at once. An offline run keeps none: W&B would copy the files into the user's home.
        options: further arguments of Lightning's `WandbLogger`, such as group, tags and notes.

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
    if log_model and mode != "online":
        rank_zero_warn(
            f"logger.wandb.log_model={log_model}, and this run is {mode}: checkpoint and report stay in the folder of the "
            "run. W&B keeps artifacts of online runs; log in (wandb login), or set WANDB_MODE=online."
        )
        log_model = False
    # "wrap" copies what Python prints; "redirect" would change the line ends of the terminal
    settings = wandb.Settings(silent=mode != "online", console="wrap")
    given = {"name": name, "save_dir": save_dir, "log_model": log_model} | options
    logger = WandbLogger(project=project, mode=mode, settings=settings, **given)
    # Lightning passes this argument on, and wandb warns in every run that it is deprecated
    logger._wandb_init.pop("anonymous", None)
    return logger


def log_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Tell every logger the configuration of the run, before training."""
    for logger in loggers:
        logger.log_hyperparams(dict(settings))


def add_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Add to the configuration in every logger what became known later."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _add_to_file(logger, settings)
        else:
            logger.log_hyperparams(dict(settings))
            logger.save()


@rank_zero_only
def _add_to_file(logger: TensorBoardLogger, settings: Mapping[str, Any]) -> None:
    """TensorBoard takes hyperparameters once, and Lightning writes their file once, at the beginning: this writes it anew."""
    logger.hparams.update(settings)
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / logger.NAME_HPARAMS_FILE) as beside:
        save_hparams_to_yaml(beside, logger.hparams)


def log_results(loggers: Iterable[Logger], results: Mapping[str, float], step: int) -> None:
    """The figures of the end, which no row has held yet, as a row of every logger.

    Args:
        loggers: all loggers of the run.
        results: figures by their names in metrics.json.
        step: the step number of the rows of the test.
    """
    for logger in loggers:
        if results:
            logger.log_metrics(dict(results), step=step)
        # written to disk before whatever comes next can fail
        logger.save()


@rank_zero_only
def log_comparison(loggers: Iterable[Logger], metrics: Mapping[str, float], step: int) -> None:
    """Make a run a row of TensorBoard's table of hyperparameters, which takes configuration and results at once.

    Args:
        loggers: all loggers of the run.
        metrics: the figures of the end, by their names in metrics.json.
        step: the step number of the rows of the test.
    """
    compared = {key: metrics[key] for key in COMPARED if key in metrics}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(logger.hparams), compared, step)


@rank_zero_only
def upload(loggers: Iterable[Logger], paths: Iterable[Path]) -> None:
    """Keep files as one artifact of every W&B run that was started with `log_model`; the checkpoint is kept by Lightning.

    Args:
        loggers: all loggers of the run.
        paths: the files; those that are not there are left out.
    """
    there = [path for path in paths if path.is_file()]
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._log_model and there:
            import wandb

            artifact = wandb.Artifact(f"results-{logger.experiment.id}", type="results")
            for path in there:
                artifact.add_file(str(path), name=path.name)
            logger.experiment.log_artifact(artifact)


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
    """End the W&B runs of a job, so that the next job of the same process starts a run of its own, and write what
    TensorBoard still holds.

    Args:
        loggers: all loggers of the job.
        failed: whether the job ended with an error, which the runs then show.
    """
    for logger in loggers:
        # the private attribute, since `experiment` would start a run that was never used
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger._experiment.finish(exit_code=int(failed))
        elif isinstance(logger, TensorBoardLogger) and logger._experiment is not None:
            logger._experiment.close()
