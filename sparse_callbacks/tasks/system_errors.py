"""What a run says that ends because the system refuses to write: a full disk, a folder that is gone."""

import pickle
from pathlib import Path

import torch


def why_ended(error: OSError, checkpoint: Path) -> str:
    """Sentences about what the system refused and what of the run is safe.

    Args:
        error: an error of the operating system, with an ``errno``.
        checkpoint: the path of the checkpoint that the run goes on from if it is there.
    """
    path = error.filename2 or error.filename  # of a file that was to be moved, the place where it should go
    where = f" at {path}" if path else ""
    step = saved_step(checkpoint)
    if step is not None:
        safe = f"{checkpoint} is whole: it holds the run up to step {step}. Free space or give the folder back first"
    elif checkpoint.exists():
        safe = (
            f"{checkpoint} cannot be read, so the run starts over. Free space or give another folder (hydra.run.dir=)"
        )
    else:
        safe = "No checkpoint was written yet. Free space, or give another folder (hydra.run.dir=)"
    return f"Run ended by the system: {error.strerror}{where}. {safe}."


def saved_step(checkpoint: Path) -> int | None:
    """The optimizer step at which a checkpoint was written; None where it is not there or not whole."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        return None
