"""Small networks of the contract, and the LightningModules that train them."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Configure = Callable[[Iterable[nn.Parameter]], Any]


OPTIMIZERS: dict[str, Configure] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-2, lr_decay=1e-2, weight_decay=1e-2),
}


def double_mlp(seed: int = 0, hidden: int = 24) -> nn.Module:
    """Two matrices in float64 and no batch statistics, for the same inputs."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, hidden), nn.Tanh(), nn.Linear(hidden, 4)).double()


class Layers(nn.Sequential):
    """torch 2.8 compiles no frame of torch's own code, so the outermost forward must be ours."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return out


def conv_net(seed: int = 0) -> nn.Module:
    """Convolution, batch norm and two matrices, for inputs [n, 2, 5, 5] and 4 classes."""
    torch.manual_seed(seed)
    return Layers(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.LayerNorm(16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class Classifier(pl.LightningModule):
    """Cross entropy of ``net``, with a learning rate that changes every step."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net: Any = conv_net() if net is None else net
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(next(self.parameters()).dtype)), y)

    def forward(self, x: Tensor) -> Any:
        return self.net(x.to(next(self.parameters()).dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0].to(next(self.parameters()).dtype))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loss_on(module: Any, batch: Any) -> Tensor:
    """The loss of a module of the contract on a batch, for methods that need one where it takes its steps by hand."""
    own = getattr(module, "loss", None)
    found: Tensor = nn.functional.cross_entropy(module(batch[0]), batch[1]) if own is None else own(batch)
    return found


class ByHand(Classifier):
    """The same training under manual optimization: ``window`` micro-batches a step, and the user's own clipping."""

    def __init__(
        self, net: nn.Module | None = None, optimizer: str = "sgd", window: int = 1, clip: float | None = None
    ) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False
        self.window, self.clip = window, clip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, schedule = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        self.manual_backward(self.loss(batch) / self.window)
        if (batch_idx + 1) % self.window == 0:
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


class Rivals(pl.LightningModule):
    """A critic that steps twice and a maker that steps once a batch, as in a GAN; the maker's loss runs through the
    critic."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        self.before_clip: Callable[[int], None] = lambda index: None
        self.after_step: Callable[[int], None] = lambda index: None

    def forward(self, x: Tensor) -> Any:
        return self.critic(self.maker(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        maker, critic = cast(Any, self.optimizers())
        for _ in range(2):
            self.step_with(1, critic, self.critic, nn.functional.cross_entropy(self.critic(self.maker(x).detach()), y))
        self.step_with(0, maker, self.maker, nn.functional.cross_entropy(self.critic(self.maker(x)), y))

    def step_with(self, index: int, optimizer: Any, net: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.before_clip(index)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        self.after_step(index)

    def configure_optimizers(self) -> list[Optimizer]:
        return [OPTIMIZERS["sgd"](self.maker.parameters()), OPTIMIZERS["adamw"](self.critic.parameters())]
