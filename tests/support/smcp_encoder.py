"""A transformer layer whose heads and units can go."""

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """A transformer layer of torch with six heads of four channels, for inputs [n, 5, 6]."""

    def __init__(self, kind: type[nn.MultiheadAttention] = nn.MultiheadAttention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 3)
        self.layer = nn.TransformerEncoderLayer(24, 6, 48, dropout=0.0, batch_first=True)
        self.layer.self_attn = kind(24, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))
