"""Random images of the contract, in an order whose position can be resumed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Batches:
    """Random images [size, 2, 5, 5] and labels; the order derives from (seed, epoch, index), so the position is all its
    state.

    Rank r of ``world`` gets every ``world``-th sample of each batch.
    """

    batch_sampler = None  # Lightning asks every loader with a sampler for it

    def __init__(self, batches: int = 8, size: int = 6, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.batches, self.size, self.seed, self.rank, self.world = batches, size, seed, rank, world
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batches * size, 2, 5, 5, generator=source)
        self.y = torch.randint(0, 4, (batches * size,), generator=source)
        self.epoch = self.next = 0
        self.resumed: dict[str, int] | None = None

    @property
    def sampler(self) -> "Batches":
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state

    def __len__(self) -> int:
        return self.batches

    def order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        resumed, self.resumed = self.resumed, None
        self.next = resumed["next"] if resumed is not None and resumed["epoch"] == self.epoch else 0
        order = self.order(self.epoch)
        while self.next < self.batches:
            chosen = order[self.next * self.size : (self.next + 1) * self.size][self.rank :: self.world]
            self.next += 1
            yield self.x[chosen], self.y[chosen]

    def in_order(self) -> "list[tuple[Tensor, Tensor]]":
        """This rank's samples, each once."""
        mine = torch.arange(len(self.x))[self.rank :: self.world]
        return [(self.x[chosen], self.y[chosen]) for chosen in torch.split(mine, self.size)]

    def all(self, epochs: int) -> list[tuple[Tensor, Tensor]]:
        """Every batch of the first ``epochs`` epochs, in order."""
        loader, found = Batches(self.batches, self.size, self.seed, self.rank, self.world), []
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            found += list(loader)
        return found


class Thirds(Batches):
    """The same samples in micro-batches, three for each batch."""

    def __len__(self) -> int:
        return 3 * self.batches

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield from zip(x.chunk(3), y.chunk(3), strict=True)
