"""Trains a network, sparse or dense, on real data: `python train.py method=rigl sparsity=0.9`.

Every choice is an override: `python train.py --help` lists the groups. The folder of the run, printed at its end, holds
metrics.json, the configuration, the checkpoints and the logs.
"""

import sys
import time
from datetime import datetime
from pathlib import Path

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from sparse_callbacks.lightning.at_target import BestAtTarget
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.lightning.curves import step_number
from sparse_callbacks.lightning.logged_network import log_end, summarize
from sparse_callbacks.tasks import (
    build,
    checks,
    early_network,
    loggers,
    multirun,
    objective,
    recorded_config,
    reports,
    run_data,
    slim,
    summary,
    system_errors,
    units,
)
from sparse_callbacks.tasks.initial_weights import load_initial_weights
from sparse_callbacks.tasks.plain_errors import end_refused, plain_errors, refusal, wants_frames
from sparse_callbacks.tasks.safe_stop import RunStopped

CONF = Path(__file__).parent.resolve() / "conf"


def run_folder(cfg: DictConfig) -> Path:
    """The absolute path of the run's folder, which is created where it is absent.

    It is `output_dir` where that is given, else Hydra's folder of the job, else a new folder under outputs/.
    """
    if cfg.output_dir is not None:
        folder = Path(cfg.output_dir)
    elif HydraConfig.initialized():
        folder = Path(HydraConfig.get().runtime.output_dir)
    else:
        folder = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
    checks.refuse_file_as_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def train(cfg: DictConfig, config_file: Path | None = None) -> dict[str, float]:
    """One run: training, test, and the results in its folder.

    Args:
        cfg: the configuration, composed from conf/train.yaml.
        config_file: the file that holds it already, which is corrected where the run has another sparsity than it says.

    Returns:
        The metrics by key: test/acc, val/acc (of the last epoch), sparsity/total, sparsity/model,
        sparsity/<parameter>, the method's own figures, updates, epochs, steps and seconds; with `slim=true` also those
        of `tasks.slim.slimmed`. The tested network is the last one, or with `test=best` that of the best epoch at
        target sparsity by val/acc.

    Raises:
        ValueError, FileNotFoundError: input that cannot work, before the first batch.
        RunStopped: Ctrl-C or SIGTERM; its checkpoint resumes the run.
    """
    # the caller's configuration stays as it was, since several runs of a process may share it
    cfg = cfg.copy()
    checks.take_paths_as_typed(cfg)
    folder = run_folder(cfg)
    cfg.output_dir = str(folder)
    # everything cheap that can be refused comes first, before data is read and loggers are started
    checks.check_choices(cfg)
    checks.check_files(cfg)
    checks.set_threads(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    method = build.build_method(cfg)
    early_network.refuse_unmatched_globs(cfg, method)
    if cfg.slim:
        slim.check(method, bool(cfg.get("onnx")))
    resumed = build.checkpoint_to_resume(cfg)
    build.refuse_sparse_checkpoint(resumed, method)
    recorded = recorded_config.as_run(cfg, method)
    if config_file is not None:
        recorded_config.correct_file(config_file, recorded)
    report = reports.build_report(cfg, folder, recorded_config.settings(recorded))
    logged = bool(cfg.get("logger"))
    callbacks = build.build_callbacks(cfg, method, folder / "checkpoints", logged, report)
    # not named `loggers`, which is the module that ends them
    used_loggers = build.build_loggers(recorded, method)
    trainer = build.build_trainer(cfg, callbacks, used_loggers)
    data = run_data.build_data(cfg)
    run_data.write_preprocessing(data, folder)
    module = build.build_module(cfg, data)
    if cfg.get("initial_weights") is not None and resumed is None:
        load_initial_weights(module, Path(cfg.initial_weights))
    failed = True
    try:
        loggers.log_settings(trainer.loggers, recorded_config.settings(recorded))
        metrics = _fit_and_test(trainer, module, data, method, cfg, resumed)
        if trainer.is_global_zero:
            slim_error, proof = None, None
            if cfg.slim and method is not None:
                try:
                    slim_metrics, proof, small = slim.slimmed(trainer, module, data, method, folder)
                    metrics |= slim_metrics
                    print(proof, flush=True)
                    if cfg.get("onnx"):
                        metrics |= slim.exported(small, data, folder)
                except Exception as error:
                    # raised again below: a failure of slimming must not lose the results of the training
                    slim_error = error
            why_no_page = (
                ""
                if report is None
                else reports.finish_report(report, metrics, proof, with_page=cfg.get("report", True) is True)
            )
            left = units.left_of(method, module, data)
            if left is not None and method is not None:
                metrics |= method.own_figures(**left.shares)
            tested = "best epoch" if cfg.test == "best" and best_checkpoint(trainer) else "last epoch"
            table = summary.summary_table(metrics, method, resumed is not None, tested, left)
            _report(metrics, table, trainer, folder, slim_error, why_no_page)
            _log_end(metrics, trainer, method, folder)
            if slim_error is not None:
                raise slim_error
            loggers.upload(trainer.loggers, [folder / name for name in ("report.html", slim.FILE, slim.ONNX_FILE)])
        failed = False
    finally:
        loggers.finish(used_loggers, failed)
    return metrics


def _fit_and_test(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    method: SparsityCallback | None,
    cfg: DictConfig,
    resumed: str | None,
) -> dict[str, float]:
    """Train and test; the metrics of the run, without those of slimming."""
    began = time.perf_counter()
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True if resumed else None)
    seconds = time.perf_counter() - began
    # read before the test, which replaces the metrics of the validation, and the updates by those of a best epoch
    steps, epochs = trainer.global_step, trainer.current_epoch
    updates = 0 if method is None else method.updates
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    if trainer.limit_test_batches != 0:
        tested = trainer.test(module, data, verbose=False, **_tested_checkpoint(cfg, trainer))
        metrics |= {key: float(value) for result in tested for key, value in result.items()}
    metrics |= summary.sparsities(method)
    if method is not None:
        metrics |= method.figures()
    counts = {"updates": float(updates), "epochs": float(epochs), "steps": float(steps)}
    return metrics | counts | {"seconds": seconds}


def _tested_checkpoint(cfg: DictConfig, trainer: pl.Trainer) -> dict[str, object]:
    """Arguments of `Trainer.test` that choose the network: none for the last one, which is in memory."""
    best = best_checkpoint(trainer)
    if cfg.test == "best" and best:
        return {"ckpt_path": best, "weights_only": True}
    return {}


def best_checkpoint(trainer: pl.Trainer) -> str:
    """The path of the best checkpoint at target sparsity; empty where no epoch was at target."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestAtTarget)]
    return keepers[0].best_model_path


def _log_end(metrics: dict[str, float], trainer: pl.Trainer, method: SparsityCallback | None, folder: Path) -> None:
    """Tell the loggers what is known at the end only: the slim network, layers, figures, and what a budget came to."""
    step = step_number(trainer)
    loggers.log_results(trainer.loggers, {k: v for k, v in metrics.items() if k.startswith("slim/")}, step)
    summarize(trainer.loggers, metrics)
    if recorded_config.target_sparsity(method) is None:
        loggers.add_settings(trainer.loggers, {"sparsity": round(metrics["sparsity/total"], 4)})
    loggers.log_comparison(trainer.loggers, metrics, step)
    log_end(trainer.loggers, [] if method is None else [method], folder, step)


def _report(
    metrics: dict[str, float],
    table: Table,
    trainer: pl.Trainer,
    folder: Path,
    slim_error: Exception | None,
    why_no_page: str,
) -> None:
    """Write metrics.json and print the table, and below it why slimming failed, or why there is no report."""
    summary.write_metrics(folder / "metrics.json", metrics)
    possible = ["report.html", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.json", slim.FILE]
    possible += [slim.ONNX_FILE, run_data.PREPROCESSING, "record/rows.jsonl", ".hydra/config.yaml"]
    written = [name for name in possible if (folder / name).exists()]
    places = {"folder": summary.relative(folder), "in it": ", ".join(written)}
    if slim_error is not None:
        places["slim"] = f"failed: {slim_error}"
    if why_no_page:
        places["report"] = why_no_page
    places |= dict(loggers.place(logger) for logger in trainer.loggers)
    summary.show(table, places)


@plain_errors(CONF)
@hydra.main(version_base=None, config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Run `train`; a run that was stopped, by a signal or by a full disk, prints the command that resumes it.

    The exit status is that of the signal, or 1. A sweeper gets the metrics that `objective` names.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        # refused before the first batch
        names = objective.objective_names(cfg)
        metrics = train(cfg, recorded_config.hydra_file())
        return objective.objective_values(metrics, names, required=objective.is_read(HydraConfig.get()))
    except RunStopped as stopped:
        print(f"Run {stopped}.", file=sys.stderr)
        if stopped.checkpoint is not None:
            _print_resume_command(stopped.checkpoint, folder)
        sys.exit(stopped.exit_code)
    except Exception as error:
        if wants_frames():
            raise
        # without a number it is a refusal of ours, in words of its own
        if isinstance(error, OSError) and error.errno is not None:
            checkpoint = Path(str(cfg.output_dir or folder)) / "checkpoints" / "last.ckpt"
            print(system_errors.why_ended(error, checkpoint), file=sys.stderr)
            if system_errors.saved_step(checkpoint) is not None:
                _print_resume_command(checkpoint, folder)
            print("HYDRA_FULL_ERROR=1 shows where it happened.", file=sys.stderr)
            sys.exit(1)
        if (text := refusal(error, CONF, sys.argv[1:])) is not None:
            end_refused(error, text, folder)
        raise


def _print_resume_command(checkpoint: Path, folder: Path) -> None:
    overrides = list(HydraConfig.get().overrides.task)
    command = summary.resume_command(sys.argv[0], overrides, checkpoint, folder)
    print(f"Resume with:\n  {command}", file=sys.stderr)


if __name__ == "__main__":
    with multirun.multirun_shown():
        main()
