"""A small language model whose weights are sparse from the start, as for interpretability: RigL at 90 %.

    python examples/language_model.py

A transformer of two layers learns to write sums ("12+7=19;"), letter by letter. Its embedding stays dense; every matrix of
attention and of the feed-forward layers is sparse from the first step to the last.
"""

import random

import torch
from torch import Tensor, nn

from sparse_callbacks import sparsify
from sparse_callbacks.methods import RigL

LETTERS = "0123456789+=;"
LENGTH = 32


class LanguageModel(nn.Module):
    """Logits [batch, length, letters] of the next letter, from letters [batch, length]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        length = letters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.layers(self.embedding(letters) + self.position[:length], mask=mask, is_causal=True)
        return self.head(hidden)


def text(size: int) -> Tensor:
    """Sums as numbers of letters, [size, LENGTH + 1]."""

    def line() -> str:
        written = ""
        while len(written) <= LENGTH:
            a, b = random.randrange(20), random.randrange(20)
            written += f"{a}+{b}={a + b};"
        return written[: LENGTH + 1]

    return torch.tensor([[LETTERS.index(letter) for letter in line()] for _ in range(size)])


def main(steps: int = 1500) -> float:
    """Train, and give the mean loss of the last 50 steps, in nats a letter."""
    torch.manual_seed(0)
    random.seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    with sparsify(RigL(0.9, exclude="head*"), model, optimizer, steps) as run:
        for step in range(steps):
            letters = text(32)
            logits = model(letters[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), letters[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if step % 300 == 0:
                print(f"step {step}: loss {losses[-1]:.3f}")
    mean = sum(losses[-50:]) / len(losses[-50:])
    print(f"loss {mean:.3f}, sparsity {run.measured_sparsity()['sparsity/total']:.1%}")
    return mean


if __name__ == "__main__":
    main()
