"""Import path of ``tasks.loggers`` in configurations saved by version 0.1."""

from sparse_callbacks.tasks.loggers import wandb_logger as wandb_logger
