"""Measures on one GPU, in at most ten minutes, what 2:4 weights gain in bf16.

    pip install -e .
    python benchmarks/semi_structured_gpu.py

It needs a GPU of CUDA with compute capability 8.0 or later, and torch with cuSPARSELt or CUTLASS, as its usual builds for Linux have.

1. One layer: its forward product, and a training step: forward with W, the input's gradient with a compressed W^T, the dense
   gradient of the weight, SGD. As weights change, each step masks and compresses both anew; masks are transposable, so that both are
   2:4.
2. What a refresh of the masks costs: the transposable masks of the layer, and the compression of a weight and its transpose.
3. A block of a vision transformer (width 1024, 16 heads, 197 tokens): forward by `to_semi_structured`, and a training step.

Times are wall time between synchronizations, medians over rounds in which all runs take turns. The tables are printed and
written to benchmarks/results/semi_structured_gpu.md.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from real_speed_gpu import Step, against, milliseconds, sgd
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks import to_semi_structured
from sparse_callbacks.core.conversion.semi_structured import why_not_on
from sparse_callbacks.core.transposable import transposable_mask

RESULTS = Path(__file__).parent / "results" / "semi_structured_gpu.md"
BLOCK_WIDTH, HEADS, TOKENS = 1024, 16, 197
REFRESH_EVERY = 40  # steps between refreshes of transposable masks, as published


class Product(torch.autograd.Function):
    """A linear product whose weight and its transpose are compressed; the weight's gradient is dense, straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        masked = weight.masked_fill(~mask, 0)
        ctx.save_for_backward(x)
        ctx.transposed = compressed(masked.t().contiguous())
        return functional.linear(x, compressed(masked))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        return functional.linear(gradient, ctx.transposed), gradient.flatten(0, -2).t() @ x.flatten(0, -2), None


def compressed(weight: Tensor) -> Tensor:
    found: Tensor = torch.sparse.to_sparse_semi_structured(weight)
    return found


class SparseLayer(nn.Module):
    """A linear layer under a transposable 2:4 mask, without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach())
        self.register_buffer("mask", transposable_mask(self.weight.detach().abs(), 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Product.apply(x, self.weight, self.mask)
        return found


class Dense(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


class Block(nn.Module):
    """A pre-norm block of a vision transformer, of the given kind of layers."""

    def __init__(self, width: int, heads: int, layer: Any) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = layer(width, 3 * width), layer(width, width)
        self.up, self.down = layer(width, 4 * width), layer(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        found: Tensor = x + self.down(functional.gelu(self.up(self.second(x))))
        return found


def made_on(device: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A module in bf16, made on its device, where masks take milliseconds."""
    with torch.device(device):
        return make().to(torch.bfloat16)


def forward_of(module: nn.Module, x: Tensor) -> Step:
    @torch.no_grad()
    def step() -> None:
        module(x)

    return step


def step_of(module: nn.Module, x: Tensor) -> Step:
    """A step of training on one batch; inputs need a gradient, as an inner layer's do."""
    optimizer, x = sgd(module), x.clone().requires_grad_()
    target = torch.randn_like(module(x))

    def step() -> None:
        module(x).backward(target)
        optimizer.step()
        optimizer.zero_grad()

    return step


def two_of_four(module: nn.Module) -> nn.Module:
    """The dense module with transposable 2:4 weights in its linear layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            layer.load_state_dict({"weight": weight * transposable_mask(weight.abs(), 2, 4)}, strict=False)
    return module


def head(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |", "|" + " --- |" * len(cells)]


def layer_rows(chosen: argparse.Namespace) -> Iterator[str]:
    for width in chosen.widths:
        x = torch.randn(chosen.rows, width, device=chosen.device, dtype=torch.bfloat16)
        dense = two_of_four(made_on(chosen.device, lambda width=width: Dense(width, width)))
        sparse = made_on(chosen.device, lambda width=width: SparseLayer(width, width))
        packed = compressed(dense.get_parameter("weight").detach())
        steps = {
            "dense": forward_of(dense, x),
            "2:4": lambda x=x, packed=packed: functional.linear(x, packed),
            "dense, step": step_of(dense, x),
            "2:4, step": step_of(sparse, x),
        }
        times = milliseconds(steps, chosen)
        forward, step = (statistics.median(times[name]) for name in ("dense", "dense, step"))
        cells = [against(times, "2:4", "dense"), f"{step:.3g}", against(times, "2:4, step", "dense, step")]
        yield f"| {width} | {forward:.3g} | {' | '.join(cells)} |"


def layer_table(chosen: argparse.Namespace) -> str:
    lines = head("width", "dense forward, ms", "2:4 forward, over dense", "dense step, ms", "2:4 step, over dense")
    return "\n".join([*lines, *layer_rows(chosen)])


def refresh_rows(chosen: argparse.Namespace) -> Iterator[str]:
    for width in chosen.widths:
        x = torch.randn(chosen.rows, width, device=chosen.device, dtype=torch.bfloat16)
        sparse = made_on(chosen.device, lambda width=width: SparseLayer(width, width))
        weight = sparse.get_parameter("weight").detach()
        masked = weight * sparse.get_buffer("mask")
        steps = {
            "step": step_of(sparse, x),
            "masks": lambda weight=weight: transposable_mask(weight.abs(), 2, 4),
            "compression": lambda masked=masked: (compressed(masked), compressed(masked.t().contiguous())),
        }
        times = milliseconds(steps, chosen)
        share = statistics.median(times["masks"]) / (REFRESH_EVERY * statistics.median(times["step"]))
        cells = [against(times, name, "step") for name in ("masks", "compression")]
        yield f"| {width} | {statistics.median(times['step']):.3g} | {' | '.join(cells)} | {share:.3f} |"


def refresh_table(chosen: argparse.Namespace) -> str:
    share = f"masks every {REFRESH_EVERY} steps, share of a step"
    lines = head("width", "2:4 step, ms", "masks, over the step", "compression of W and W^T, over the step", share)
    return "\n".join([*lines, *refresh_rows(chosen)])


def block_table(chosen: argparse.Namespace) -> str:
    device, width = chosen.device, chosen.block_width
    x = torch.randn(chosen.images, TOKENS, width, device=device, dtype=torch.bfloat16)
    dense = two_of_four(made_on(device, lambda: Block(width, HEADS, Dense)))
    served, table = to_semi_structured(dense, rows=chosen.images * TOKENS)
    sparse = made_on(device, lambda: Block(width, HEADS, SparseLayer))
    steps = {
        "forward, dense": forward_of(dense, x),
        "forward, 2:4": forward_of(served, x),
        "step, dense": step_of(dense, x),
        "step, 2:4": step_of(sparse, x),
    }
    times = milliseconds(steps, chosen)
    lines = head("block", "dense, ms", "2:4, over dense")
    for what in ("forward", "step"):
        middle = statistics.median(times[f"{what}, dense"])
        lines.append(f"| {what} | {middle:.3g} | {against(times, f'{what}, 2:4', f'{what}, dense')} |")
    return "\n".join([*lines, "", "```", str(table), "```"])


def why_not(device: str) -> str:
    """Why nothing can be measured on a device; empty where it can be."""
    try:
        torch.empty(1, device=device)
        why = why_not_on(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # a build of torch without the device raises the second
        why = str(error).splitlines()[0]
    return (
        f"--device {device} cannot be used here ({why}). Run this on a machine with an NVIDIA GPU and its driver"
        if why
        else ""
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, default=4096, help="rows of the batch of a layer")
    parser.add_argument("--images", type=int, default=64, help="images of the batch of the block")
    parser.add_argument("--block-width", type=int, default=BLOCK_WIDTH)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each run in a round")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    if why := why_not(chosen.device):
        parser.error(why)
    torch.manual_seed(0)
    name = "a trial" if chosen.device == "cpu" else torch.get_device_module(chosen.device).get_device_name()
    text = (
        f"# 2:4 weights on one GPU\n\n{name}, torch {torch.__version__}, bf16, {chosen.rows} rows, SGD with momentum, eager mode. "
        "Written by `python benchmarks/semi_structured_gpu.py`.\n"
    )
    parts = {
        "One layer": layer_table,
        "A refresh of the masks": refresh_table,
        "A block of a vision transformer": block_table,
    }
    for title, table in parts.items():
        part = f"\n## {title}\n\n{table(chosen)}\n"
        print(part, flush=True)
        text += part
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(text)


if __name__ == "__main__":
    main()
