"""What configurations may compute: epochs as shares of the run, `${epochs:1}`."""

from omegaconf import DictConfig, OmegaConf

FEWEST = 3
"""Epochs that a calendar of epochs needs: one before the first update, one between updates, and one after the last."""
PARTS_OF_A_SHORT_RUN = 4
"""What a run of fewer epochs is divided into; one more than it needs, as shares are rounded to steps."""


def epochs_as_share(count: float, *, _root_: DictConfig) -> float:
    """The share of the run that ends with the epoch `count`, or, where `count` is negative, that lacks as many at its end.

    So an update falls at the end of every epoch whatever `trainer.limit_train_batches` and `data.batch_size` are:
    `every: ${epochs:1}`. In a run of fewer than three epochs a quarter of it counts as an epoch, so that start, interval and stop
    fit it.

    Args:
        count: the number of epochs; below 0 counted from the end of the run.
        _root_: the whole configuration, which OmegaConf supplies.

    Raises:
        ValueError: the run has no number of epochs.
    """
    epochs = _root_.trainer.get("max_epochs")
    if epochs is None or epochs < 1:
        raise ValueError(
            f"${{epochs:{count}}} is a share of trainer.max_epochs, which is {epochs}. Give the number of epochs, or in the "
            "place of ${epochs:...} optimizer steps (int) or a share of the run (float)."
        )
    share = count / (epochs if epochs >= FEWEST else PARTS_OF_A_SHORT_RUN)
    return float(share if count >= 0 else 1 + share)


def register() -> None:
    """Let every configuration of this process use them; they may be registered already."""
    OmegaConf.register_new_resolver("epochs", epochs_as_share, replace=True)
