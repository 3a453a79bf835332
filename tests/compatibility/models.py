"""Rows about models and about loaders."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from support.methods import CONTRACTS
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from compatibility.cells import feature, train
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier

# ---------------------------------------------------------------------- models


class Detector(pl.LightningModule):
    """torchvision's RetinaNet over a backbone of two convolutions: lists of images and of dicts go in, a dict of losses
    comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [("body", nn.Conv2d(2, 8, 3, 2, 1)), ("norm", nn.BatchNorm2d(8)), ("act", nn.ReLU())]
        backbone: Any = nn.Sequential(OrderedDict([*layers, ("out", nn.Conv2d(8, 8, 3, 2, 1))]))
        backbone.out_channels = 8
        size = {"min_size": 16, "max_size": 16, "image_mean": [0.0, 0.0], "image_std": [1.0, 1.0]}
        anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
        self.net = RetinaNet(backbone, num_classes=4, anchor_generator=anchors, detections_per_img=4, **size)

    def forward(self, images: list[Tensor]) -> Any:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.net(*batch).values())  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def scenes() -> DataLoader[Any]:
    """Eight batches of two images, each with one box."""
    source = torch.Generator().manual_seed(0)
    box = torch.tensor([[2.0, 2.0, 11.0, 12.0]])
    samples = [
        (torch.rand(2, 16, 16, generator=source), {"boxes": box, "labels": torch.tensor([1 + i % 3])})
        for i in range(16)
    ]
    return DataLoader(samples, batch_size=2, collate_fn=lambda batch: tuple(map(list, zip(*batch, strict=True))))  # type: ignore[arg-type]


@feature("models", "a detector (torchvision's RetinaNet)")
def detector(name: str, folder: Path) -> None:
    train(name, Detector(), loader=scenes(), arguments={"loss": None})


class Words(pl.LightningModule):
    """A transformer over 25 positions with an embedding, attention and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 32)

    def forward(self, tokens: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens), mask=mask, is_causal=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (tokens,) = batch
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


@feature("models", "a transformer")
def transformer(name: str, folder: Path) -> None:
    tokens = torch.randint(0, 32, (48, 13), generator=torch.Generator().manual_seed(0))
    # of its channels only those between two linear layers can go
    loader = DataLoader(TensorDataset(tokens), batch_size=6)
    train(name, Words(), loader=loader, arguments={"budget": 0.8, "loss": None})


class Gan(pl.LightningModule):
    """A generator of transposed convolutions and a discriminator, each with its optimizer, in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 2, 3), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Any:
        return self.discriminator(self.generator(x[:, :, :1, :1].repeat(1, 3, 1, 1)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        makes, tells = self.optimizers()  # type: ignore[misc]
        real = batch[0]
        noise = torch.randn(len(real), 6, 1, 1, generator=torch.Generator().manual_seed(batch_idx))
        made = self.generator(noise)
        tells.zero_grad()
        loss = nn.functional.softplus(-self.discriminator(real)) + nn.functional.softplus(
            self.discriminator(made.detach())
        )
        self.manual_backward(loss.mean())
        tells.step()
        makes.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.discriminator(made)).mean())
        makes.step()

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), lr=2e-3, betas=(0.5, 0.99)) for part in parts]


@feature("models", "a GAN")
def gan(name: str, folder: Path) -> None:
    def loss(gan: Gan, batch: Any) -> Tensor:
        return gan(batch[0]).square().mean()  # of the discriminator on fakes, which both networks take part in

    # manual optimization has no loss of its own for those scores that are made of one
    of_loss = CONTRACTS[name]().settings.arguments.get("loss") is not None
    train(name, Gan(), arguments={"loss": loss} if of_loss else None)


class Rounded(torch.autograd.Function):
    """Rounds to 8 bits; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        scale = weight.abs().max().clamp(min=1e-8) / 127
        return (weight / scale).round() * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


class RoundedLinear(nn.Linear):
    """A linear layer that computes with rounded weights, as quantisation-aware training does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, Rounded.apply(self.weight), self.bias)


@feature("models", "quantisation-aware training (fake-quantised layers)")
def quantised(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), RoundedLinear(50, 24), nn.ReLU(), RoundedLinear(24, 4))
    _, callback = train(name, Classifier(net))
    for key, mask in callback.masks.items():  # zero has a code of its own, so pruned weights stay zero
        weight = net.get_parameter(key.removeprefix("net."))
        assert not weight.dim() > 1 or not Rounded.apply(weight)[~mask].any()


@feature("models", "quantisation-aware training (torch.ao)")
def quantised_by_torch(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.ReLU(), nn.Linear(24, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
        prepared = torch.ao.quantization.prepare_qat(net.train())
    train(name, Classifier(prepared))


# ---------------------------------------------------------------------- loaders


class Stream(IterableDataset[Any]):
    """Samples whose number nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        data = Batches()
        yield from zip(data.x, data.y, strict=True)


@feature("loaders", "an iterable of unknown length")
def iterable(name: str, folder: Path) -> None:
    train(name, Classifier(), loader=DataLoader(Stream(), batch_size=6))


class OfTwo(Classifier):
    """Takes a dict of two batches."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch["one"]) + super().loss(batch["other"])


@feature("loaders", "CombinedLoader")
def combined(name: str, folder: Path) -> None:
    loaders = {"one": Batches(), "other": Batches(seed=1, batches=5)}
    train(name, OfTwo(), loader=CombinedLoader(loaders, "max_size_cycle"))


class OfDicts(Classifier):
    """Takes a dict of named tensors."""

    def forward(self, image: Tensor, label: Tensor) -> Any:
        return self.net(image)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(**batch), batch["label"])


@feature("loaders", "batches that are dicts")
def dicts(name: str, folder: Path) -> None:
    data = Batches()
    samples = [{"image": x, "label": y} for x, y in zip(data.x, data.y, strict=True)]
    train(name, OfDicts(), loader=DataLoader(samples, batch_size=6))  # type: ignore[arg-type]


class Sample(NamedTuple):
    """A batch of a type of the user's own."""

    label: Tensor
    image: Tensor


class Own:
    """A batch that is no collection at all."""

    def __init__(self, samples: list[Sample]) -> None:
        self.image = torch.stack([s.image for s in samples])
        self.label = torch.stack([s.label for s in samples])

    def to(self, *_: Any, **__: Any) -> "Own":
        return self


class OfOwn(Classifier):
    """Takes the user's own batches."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch.image, batch.label))


@feature("loaders", "batches of your own class")
def own(name: str, folder: Path) -> None:
    data = Batches()
    samples = [Sample(y, x) for x, y in zip(data.x, data.y, strict=True)]
    train(name, OfOwn(), loader=DataLoader(samples, batch_size=6, collate_fn=Own))  # type: ignore[arg-type]
