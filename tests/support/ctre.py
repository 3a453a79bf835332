"""A network, a recorder of updates and short runs of CTRE."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from sparse_callbacks import CTRE
from sparse_callbacks.testing.runs import trainer_for
from support.data import loader
from support.inside import Moment, around_updates, before_measuring, parameters_of
from support.nets import Regression, mlp, sgd
from support.rig import copied_masks

FIRST, SECOND = "net.0.weight", "net.2.weight"


class Net(Regression):
    """With a forward, and a validation whose metric follows ``script``, one value an epoch."""

    def __init__(self, net: nn.Module | None = None, script: list[float] | None = None, configure: Any = sgd) -> None:
        super().__init__(mlp(12, 20, 6) if net is None else net, configure)
        self.script = script

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.script is not None:
            self.log("score", self.script[min(self.current_epoch, len(self.script) - 1)])
        self.log("loss", 1.0)


class Watch(Callback):
    """State before and after each update."""

    def __init__(self, callback: CTRE) -> None:
        self.updates: list[dict[str, Any]] = []
        self.passes: list[int] = []
        self.callback = callback
        around_updates(callback, self.before, self.after)
        before_measuring(callback, lambda: self.passes.append(callback.step))

    def weights(self, names: list[str]) -> dict[str, Tensor]:
        return {n: parameters_of(self.callback)[n].detach().clone() for n in names}

    def before(self, moment: Moment) -> None:
        similarity = {n: t.clone() for n, t in self.callback.aux.items() if n.startswith("similarity/")}
        self.last = {
            "step": moment.step,
            "weights": self.weights(moment.names),
            "before": copied_masks(self.callback),
            "similarity": {n.partition("/")[2]: t for n, t in similarity.items()},
        }

    def after(self, moment: Moment) -> None:
        self.last |= {
            "new_weights": self.weights(moment.names),
            "after": copied_masks(self.callback),
            "events": moment.figures,
        }
        self.updates.append(self.last)

    @property
    def steps(self) -> list[int]:
        return [u["step"] for u in self.updates]


def ctre(**options: Any) -> CTRE:
    given = {"sparsity": 0.5, "distribution": "uniform", "print_plan": False} | options
    return CTRE(**{k: v for k, v in given.items() if v is not ...})


def run(
    path: Path, callback: CTRE, module: LightningModule | None = None, epochs: int = 3, batches: int = 5, **options: Any
) -> tuple[Watch, LightningModule, Trainer]:
    watch, module = Watch(callback), module or Net()
    made = trainer_for([callback, watch, *options.pop("more", [])], path, max_epochs=epochs, **options)
    made.fit(module, loader(batches), loader(1) if getattr(module, "script", None) is not None else None)
    return watch, module, made
