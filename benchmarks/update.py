"""Measures a topology update and threshold selection on ResNet-50, against other packages.

    pip install -e ".[all]"
    python benchmarks/update.py --rounds 5 --threads 1

All candidates run in one process, take turns in an order that rotates from round to round, and begin from the same
state each time; their results are compared. With one thread the clock is the CPU time of the process, with more it is
wall time. The table is printed and written to benchmarks/results/update.md.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rigl_torch.RigL import RigLScheduler
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import resnet50

from sparse_callbacks import RigL, ops
from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.selection import select

SPARSITY, DROP_FRACTION = 0.9, 0.3
ENDLESS = 10**9  # steps of a run so long that the drop fraction has not begun to fall
RESULTS = Path(__file__).parent / "results" / "update.md"

Rows = dict[str, Callable[[], object]]


class NoHost:
    """The host of a single step: there is no data, and nothing to restart."""

    announces_steps = True

    def data_pass(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this benchmark passes over no data; time a method that reads none")

    def request_restart(self) -> None:
        raise RuntimeError("this benchmark has no phases; time a method without them")

    def inform(self, text: str) -> None:
        print(text)


class Update:
    """One RigL update from the same state by rigl-torch and by our callback, driven as Lightning drives it.

    The time of ours is that of the whole optimizer step that the update replaces: gradients are checked and taken away,
    masks chosen, grown weights and their momentum cleared, masks applied and connections counted. The time of
    rigl-torch is that of its ``_rigl_step``. It leaves the first convolution dense (9408 of 25.5 M weights), so both
    update the other 53 layers.
    """

    title = f"One RigL update (sparsity {SPARSITY}, {DROP_FRACTION} dropped)"
    reference, of, goal, at_most = "sparse_callbacks", "rigl-torch", 15, False

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        model = resnet50()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        # 0.3 in single precision, as in RigL's own code, so that both drop the same number
        alpha = float(torch.tensor(DROP_FRACTION))
        self.peer = RigLScheduler(
            model, optimizer, dense_allocation=1 - SPARSITY, T_end=ENDLESS, alpha=alpha, ignore_linear_layers=False
        )
        names = {id(p): name for name, p in model.named_parameters()}
        self.layers = {names[id(self.peer.W[i])]: i for i, sparsity in enumerate(self.peer.S) if sparsity > 0}
        self.masks = {name: self.peer.backward_masks[i].clone() for name, i in self.layers.items()}
        self.weights = {name: self.peer.W[i].detach().clone() for name, i in self.layers.items()}
        self.grads = {name: torch.randn_like(weight) for name, weight in self.weights.items()}
        self.momenta = {name: torch.randn_like(weight) * self.masks[name] for name, weight in self.weights.items()}
        self.peer_momenta: dict[str, Tensor] = {}
        for name, i in self.layers.items():
            self.peer.W[i].grad = self.grads[name].clone()
            self.peer.backward_hook_objects[i].dense_grad = self.grads[name]
            self.peer_momenta[name] = optimizer.state[self.peer.W[i]]["momentum_buffer"] = self.momenta[name].clone()
        self.callback: RigL | None = None
        self.model = resnet50()
        self.own = dict(self.model.named_parameters())
        self.optimizer = torch.optim.SGD(self.own.values(), lr=0.1, momentum=0.9)
        for name, momentum in self.momenta.items():
            self.optimizer.state[self.own[name]]["momentum_buffer"] = momentum.clone()

    def reset(self) -> None:
        """Put both back into the state before the update; this is not timed."""
        for name, i in self.layers.items():
            self.peer.W[i].data.copy_(self.weights[name])
            self.peer.backward_masks[i].data.copy_(self.masks[name])
            self.peer_momenta[name].copy_(self.momenta[name])
            self.own[name].data.copy_(self.weights[name])
            self.own[name].grad = self.grads[name]
            self.optimizer.state[self.own[name]]["momentum_buffer"].copy_(self.momenta[name])
        if self.callback is not None:
            self.callback.engine.unbind()
        self.callback = RigL(SPARSITY, distribution="uniform", keep_dense="first", drop_fraction=DROP_FRACTION)
        entries = select(self.model, self.callback.include, self.callback.exclude, self.callback.keep_dense)
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        self.callback.saved = SavedRun.of({"steps": {}, "done": {}, "updates": 0, "masks": masks})
        self.callback.engine.bind(self.model, entries, [self.optimizer], [False], NoHost())
        self.callback.calendar = Calendar(every=100, start=0, stop=ENDLESS)

    def run_peer(self) -> None:
        self.peer._rigl_step()

    def run_ours(self) -> None:
        engine = self.callback.engine
        if engine.before(self.optimizer, tick=0).replaced:
            engine.withhold(self.optimizer)
        self.optimizer.step()
        engine.batch_over()

    def check(self) -> None:
        if self.callback.updates != 1:
            raise RuntimeError(
                f"the callback made {self.callback.updates} updates where it had to make one; do not trust the times"
            )
        for name, i in self.layers.items():
            mask, momentum = self.callback.masks[name], self.optimizer.state[self.own[name]]["momentum_buffer"]
            # rigl-torch clears the momentum of dropped weights at once, we do when they grow again
            pairs = (
                (mask, self.peer.backward_masks[i]),
                (self.own[name], self.peer.W[i]),
                (momentum * mask, self.peer_momenta[name]),
            )
            if not all(torch.equal(a.detach(), b.detach()) for a, b in pairs):
                raise RuntimeError(
                    f"{name}: our masks, weights or momenta differ from rigl-torch's; do not trust the times"
                )

    def rows(self) -> Rows:
        return {"rigl-torch": self.run_peer, "sparse_callbacks": self.run_ours}


class GlobalMask:
    """A magnitude mask over all layers together on a dense model (`global_unstructured` is quicker on a pruned one)."""

    title = f"One global magnitude mask (sparsity {SPARSITY})"
    reference, of, goal, at_most = "sparse_callbacks", "torch.nn.utils.prune.global_unstructured", 30, False

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.count = sum(w.numel() for w in weights) - round(SPARSITY * sum(w.numel() for w in weights))
        self.reset()

    def reset(self) -> None:
        self.holders = [nn.Module() for _ in self.weights]
        for holder, weight in zip(self.holders, self.weights, strict=True):
            holder.weight = nn.Parameter(weight.clone())

    def run_peer(self) -> None:
        named = [(holder, "weight") for holder in self.holders]
        prune.global_unstructured(named, pruning_method=prune.L1Unstructured, amount=SPARSITY)

    def run_ours(self) -> None:
        self.masks = ops.keep_largest_jointly(self.weights, self.count)

    def check(self) -> None:
        smallest = min(w[mask].abs().min() for w, mask in zip(self.weights, self.masks, strict=True) if mask.any())
        for holder, weight, mask in zip(self.holders, self.weights, self.masks, strict=True):
            # among equal magnitudes at the threshold topk takes any
            if ((holder.weight_mask.bool() != mask) & (weight.abs() != smallest)).any():
                raise RuntimeError("our global mask differs from global_unstructured's; do not trust the times")

    def rows(self) -> Rows:
        return {"torch.nn.utils.prune.global_unstructured": self.run_peer, "sparse_callbacks": self.run_ours}


class Threshold:
    """The exact threshold of the 10 % largest magnitudes of each layer, against one pass that writes all magnitudes."""

    title = f"Exact threshold of each layer (the {1 - SPARSITY:.0%} largest kept)"
    reference, of, goal, at_most = "torch.abs(w, out=own buffer of w)", "sparse_callbacks", 12, True

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        self.counts = [w.numel() - ops.zeros_for(SPARSITY, w.numel()) for w in weights]
        self.buffers = [torch.empty_like(w) for w in weights]
        self.found: dict[str, list[Tensor]] = {}

    def reset(self) -> None:
        self.found.clear()

    def each(self, name: str, select: Callable[[Tensor, int], Tensor]) -> Callable[[], None]:
        def run() -> None:
            self.found[name] = [select(w, count) for w, count in zip(self.weights, self.counts, strict=True)]

        return run

    def copy_magnitudes(self) -> None:
        for weight, buffer in zip(self.weights, self.buffers, strict=True):
            torch.abs(weight, out=buffer)

    def check(self) -> None:
        first, *others = self.found.values()
        if any(a != b for other in others for a, b in zip(first, other, strict=True)):
            raise RuntimeError("the thresholds differ; do not trust the times")

    def rows(self) -> Rows:
        return {
            "topk of everything (full sort)": self.each(
                "sort", lambda w, k: w.abs().view(-1).topk(w.numel())[0][k - 1]
            ),
            "topk": self.each("topk", lambda w, k: w.abs().view(-1).topk(k, sorted=False).values.min()),
            "kthvalue": self.each("kthvalue", lambda w, k: w.abs().view(-1).kthvalue(w.numel() - k + 1).values),
            "sparse_callbacks": self.each("ours", ops.kth_largest),
            "torch.abs(w, out=own buffer of w)": self.copy_magnitudes,
        }


Case = Update | GlobalMask | Threshold


def timed(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each row in each round; the first round warms up and is left out."""
    rows = case.rows()
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        case.reset()
        names = list(rows)[turn % len(rows) :] + list(rows)[: turn % len(rows)]
        for name in names:
            start = clock()
            rows[name]()
            if turn:
                seconds[name].append(clock() - start)
        case.check()
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, reference: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of a row's time to that of `reference` in the same round."""
    each = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
    return statistics.median(each), min(each), max(each)


def table(case: Case, seconds: dict[str, list[float]]) -> str:
    """Times and ratios to the case's reference as Markdown, then the goal of the case and what was reached."""
    lines = [f"| | median (range), ms | over {case.reference} (range) |", "| --- | --- | --- |"]
    for name, times in seconds.items():
        middle, low, high = (1e3 * f(times) for f in (statistics.median, min, max))
        ratio = "{:.1f} ({:.1f} - {:.1f})".format(*ratios(seconds, name, case.reference))
        lines.append(f"| {name} | {middle:.0f} ({low:.0f} - {high:.0f}) | {ratio} |")
    reached = ratios(seconds, case.of, case.reference)[0]
    if case.at_most:
        met, bound = reached <= case.goal, "most"
    else:
        met, bound = reached >= case.goal, "least"
    goal = f"Goal: {case.of} takes at {bound} {case.goal} times as long as {case.reference}."
    return "\n".join([*lines, "", f"{goal} Reached: {reached:.1f}, {'met' if met else 'missed'}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds, after one that warms up")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="numbers of torch threads, with tables for each"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, masks and gradients")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    weights = [p.detach().clone() for p in resnet50().parameters() if p.dim() > 1]
    text = (
        f"# Topology update on ResNet-50 ({sum(w.numel() for w in weights) / 1e6:.1f} M weights)\n\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, "
        f"float32. {arguments.rounds} rounds,\ninterleaved; equal results checked in every round. "
        "Written by `python benchmarks/update.py`.\n"
    )
    print(text)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        if threads == 1:
            clock, measured = time.process_time, "1 thread, CPU time of the process"
        else:
            # threads that wait for each other consume CPU time too
            clock, measured = time.perf_counter, f"{threads} threads, wall time"
        text += f"\n## {measured}\n"
        for case in (Update(arguments.seed), GlobalMask(weights), Threshold(weights)):
            with torch.no_grad():
                part = f"\n### {case.title}\n\n{table(case, timed(case, arguments.rounds, clock))}\n"
            print(measured, part, flush=True)
            text += part
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
