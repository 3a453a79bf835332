"""The record and the page of a run of `train.py`."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sparse_callbacks.channels.proof import Proof
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.record.page import PAGE, why_no_page, write_page
from sparse_callbacks.core.record.record_file import refuse_unrecorded
from sparse_callbacks.lightning.sparsity_report import SparsityReport

OF_THE_RUN = ("hydra.run.", "hydra.job.")
"""How the arguments of Hydra begin that belong to one run."""
REPORTS = (True, False, "record")  # values of the root key `report`


def build_report(cfg: DictConfig, folder: Path, configuration: Any) -> SparsityReport | None:
    """The callback that records the run into its folder; None with `report=false`.

    The page is written by `finish_report`, when the run has been tested.

    Args:
        cfg: the configuration.
        folder: the folder of the run.
        configuration: the configuration as the record keeps it.

    Raises:
        FileNotFoundError: `dense_run` names a folder without a record.
        ValueError: `dense_run` is given, and `report=false`; or `report` is none of its choices.
    """
    if cfg.get("report", True) not in REPORTS:
        raise ValueError(
            f"report={cfg.report!r} is not known. Use report=true, report=record for a record without a page, or report=false."
        )
    if not cfg.get("report", True):
        if cfg.get("dense_run") is not None:
            raise ValueError(f"dense_run={cfg.dense_run} is compared with in the report, and report=false writes none.")
        return None
    if cfg.get("dense_run") is not None:
        refuse_unrecorded(Path(cfg.dense_run), "dense_run")
    return SparsityReport(
        folder, dense=cfg.get("dense_run"), page=False, configuration=configuration, command=typed_command()
    )


def typed_command() -> str | None:
    """The command of this run alone, also where it is one of a multirun; None outside of Hydra."""
    if not HydraConfig.initialized():
        return None
    typed = HydraConfig.get().overrides
    # of Hydra's own arguments those of this run: the others made a multirun of it, which this is one job of
    own = [text for text in typed.hydra if text.lstrip("+~").startswith(OF_THE_RUN)]
    return shlex.join(["python", Path(sys.argv[0]).name, *typed.task, *own])


def finish_report(report: SparsityReport, metrics: Mapping[str, float], proof: Proof | None, with_page: bool) -> str:
    """Add to the record what the end of a run has shown, and write its page.

    Args:
        report: the callback that has recorded the run.
        metrics: the results of the run by name.
        proof: what slimming has changed; None without slimming.
        with_page: whether the page is wanted, as with `report=true`.

    Returns:
        Why there is no page, as a sentence for the user; empty where it was written or is not wanted.
    """
    if report.folder is None or not report.is_recorded:
        return ""  # no batch came, or a trial run
    try:
        channels = {} if proof is None else channels_of(proof)
        report.add(results={name: float(value) for name, value in metrics.items()}, channels=channels)
        if not with_page:
            return ""
        if text := why_no_page():
            return text
        write_page(report.folder, report.dense)
    except Exception as error:  # whatever drawing may raise: the results of the run must not be lost
        return f"{PAGE} was not written ({with_class(error)}). The record is complete: python -m sparse_callbacks.report writes it."
    return ""


def channels_of(proof: Proof) -> dict[str, Any]:
    """What slimming has changed, as a record keeps it: FLOPs for one sample, and the latency of as many as ``samples`` says."""
    samples = proof.samples or 1
    sides = {"before": proof.before, "after": proof.after}
    costs: dict[str, Any] = {
        side: {"parameters": float(found.parameters), "flops": found.flops / samples, "latency": found.latency}
        for side, found in sides.items()
    }
    if proof.samples is not None:
        costs["samples"] = proof.samples
    groups = [{"name": g.name, "units": g.size, "removed": g.units, "reason": g.reason} for g in proof.rows]
    return {**costs, "groups": groups, "proof": str(proof)}
