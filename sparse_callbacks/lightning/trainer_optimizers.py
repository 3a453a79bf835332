"""The optimizers of a Trainer: those that it steps, and those that take their steps."""

from typing import Any

from pytorch_lightning import LightningModule

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core import two_pass
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.refusals import gradients_are_read


class TrainerOptimizers:
    """The optimizers of a Trainer as they are configured now.

    Args:
        trainer: a Trainer whose optimizers are set up.
        module: its module.

    Raises:
        ValueError: an optimizer under which a mask cannot be kept.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module, self._given = trainer, module, list(trainer.optimizers)
        scaled = scaler_of(trainer) is not None
        torch_optimizers.refuse(self._given, scaled)
        self.steppers = two_pass.steppers(self._given, scaled)
        """Those that take the steps: of an optimizer of two passes the one that it holds."""
        torch_optimizers.refuse(self.steppers, scaled)
        self.two_pass = two_pass.two_pass(self._given, self.steppers)
        """Those of the steppers that another optimizer perturbs weights for."""

    @property
    def trained(self) -> set[int]:
        """``id`` of every parameter that one of them steps."""
        return torch_optimizers.parameter_ids(*self._given)

    @property
    def gradients_read(self) -> list[bool]:
        """For each optimizer, whether anybody reads gradients between backward and its step."""
        automatic = self._module.automatic_optimization
        # in manual optimization they are masked after backward, which a raw loss.backward() does not announce
        return [
            not torch_optimizers.is_elementwise(o) or (automatic and gradients_are_read(self._trainer, self._module, o))
            for o in self._given
        ]

    @property
    def why_not_resumed(self) -> str:
        """Why a resumed run will differ; empty where it will not."""
        return two_pass.why_not_resumed(self._given, self.steppers)

    def take_over(self, engine: Engine) -> None:
        """Let an engine that is bound go on with these."""
        engine.rebind(self.steppers, self.gradients_read, self.two_pass)
        engine.announce_by_hooks()
        engine.restart_wanted = False


def scaler_of(trainer: Trainer) -> Any | None:
    """The GradScaler of a Trainer in half precision; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)
