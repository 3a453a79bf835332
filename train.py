"""Train a network sparse (or dense) on real data: `python train.py method=rigl sparsity=0.9`.

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
from omegaconf import DictConfig, OmegaConf

from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks import build, loggers, slim, summary
from sparse_callbacks.tasks.at_target import BestAtTarget
from sparse_callbacks.tasks.safe_stop import RunStopped


def run_folder(cfg: DictConfig) -> Path:
    """`output_dir` where it is given, else Hydra's folder of the job, else a new one under outputs/."""
    if cfg.output_dir is not None:
        folder = Path(cfg.output_dir)
    elif HydraConfig.initialized():
        folder = Path(HydraConfig.get().runtime.output_dir)
    else:
        folder = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def train(cfg: DictConfig) -> dict[str, float]:
    """One run: fit, test, and what it leaves in its folder.

    Args:
        cfg: composed from conf/train.yaml.

    Returns:
        test/acc, val/acc (last epoch), sparsity/total, sparsity/model, sparsity/<parameter>, the method's own figures, updates,
        epochs, steps and seconds; with `slim=true` those of `tasks.slim.slimmed`. The tested network is the last one, with `test=best`
        the best epoch at target sparsity by val/acc.

    Raises:
        ValueError, FileNotFoundError: input that cannot work, before the first batch.
        RunStopped: Ctrl-C or SIGTERM; its checkpoint resumes the run.
    """
    cfg = cfg.copy()
    folder = run_folder(cfg)
    cfg.output_dir = str(folder)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    build.check_choices(cfg)
    method = build.build_method(cfg)
    if cfg.slim:
        slim.check(method)
    resumed = build.checkpoint_to_resume(cfg)
    build.refuse_sparse_checkpoint(resumed, method)
    data = hydra.utils.instantiate(cfg.data)
    module = build.build_module(cfg, data)
    callbacks = build.build_callbacks(cfg, method, folder / "checkpoints", logged=bool(cfg.get("logger")))
    used_loggers = build.build_loggers(cfg)
    failed = True
    try:
        trainer = build.build_trainer(cfg, callbacks, used_loggers)
        metrics = _fit_and_test(trainer, module, data, method, cfg, resumed)
        if trainer.is_global_zero:
            problem = None
            if cfg.slim and method is not None:
                try:
                    found, proof = slim.slimmed(trainer, module, data, method, folder)
                    metrics |= found
                    print(proof, flush=True)
                except Exception as error:  # the run's results are kept whatever comes
                    problem = error
            _leave(metrics, method, trainer, folder, resumed is not None, problem)
            if problem is not None:
                raise problem
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
    plain = OmegaConf.to_container(cfg, resolve=True)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)  # type: ignore[arg-type]
    began = time.perf_counter()
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True if resumed else None)
    seconds = time.perf_counter() - began
    steps, epochs = trainer.global_step, trainer.current_epoch
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    if trainer.limit_test_batches != 0:
        tested = trainer.test(module, data, verbose=False, **_tested_checkpoint(cfg, trainer))
        metrics |= {key: float(value) for result in tested for key, value in result.items()}
    metrics |= summary.sparsities(method) | ({} if method is None else method.figures())
    updates = 0 if method is None else method.updates
    return metrics | {"updates": float(updates), "epochs": float(epochs), "steps": float(steps), "seconds": seconds}


def _tested_checkpoint(cfg: DictConfig, trainer: pl.Trainer) -> dict[str, object]:
    """Arguments of `Trainer.test` that choose the network: none for the last one, which is in memory."""
    best = best_checkpoint(trainer)
    return {"ckpt_path": best, "weights_only": True} if cfg.test == "best" and best else {}


def best_checkpoint(trainer: pl.Trainer) -> str:
    """Path of the best checkpoint at target sparsity; empty where there was no such epoch."""
    return next(c for c in trainer.checkpoint_callbacks if isinstance(c, BestAtTarget)).best_model_path


def _leave(
    metrics: dict[str, float],
    method: SparsityCallback | None,
    trainer: pl.Trainer,
    folder: Path,
    resumed: bool,
    problem: Exception | None = None,
) -> None:
    """metrics.json and the table, which names a `problem` of slimming."""
    summary.write_metrics(folder / "metrics.json", metrics)
    inside = ["checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.json", slim.FILE, ".hydra/config.yaml"]
    places = {"folder": summary.relative(folder), "in it": ", ".join(p for p in inside if (folder / p).exists())}
    places |= {} if problem is None else {"slim": f"failed: {problem}"}
    places |= dict(loggers.place(logger) for logger in trainer.loggers)
    summary.show(metrics, method, places, resumed)


@hydra.main(version_base=None, config_path=str(Path(__file__).parent.resolve() / "conf"), config_name="train")
def main(cfg: DictConfig) -> None:
    try:
        train(cfg)
    except RunStopped as stopped:
        print(f"Run {stopped}.", file=sys.stderr)
        if stopped.checkpoint is not None:
            overrides, folder = list(HydraConfig.get().overrides.task), Path(HydraConfig.get().runtime.output_dir)
            command = summary.resume_command(sys.argv[0], overrides, stopped.checkpoint, folder)
            print(f"Resume with:\n  {command}", file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
