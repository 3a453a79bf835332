"""What a run has gained: accuracy, zeros, bytes, FLOPs and latency beside a dense network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_callbacks.core.record.record_file import RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.series import active_weights, best, last, metrics, number

MEMORY = {"weights": "weights", "optimizer": "optimizer state", "masks": "masks", "dense_copies": "dense copies"}
"""What is counted under ``bytes/...``, and its name."""


@dataclass(frozen=True)
class Gain:
    """A figure of the run beside that of a dense network: texts; empty where there is nothing to say."""

    name: str
    own: str
    dense: str = ""
    difference: str = ""


def main_metric(run: RecordedRun) -> str:
    """The metric that a run is judged by: an accuracy before a loss, of tests before that of validation; empty without one."""
    names = [*run.run.results, *metrics(run)]

    def rank(name: str) -> tuple[bool, bool, bool]:
        lowered = name.lower()
        return not readable.is_accuracy(name), "test" not in lowered, "val" not in lowered

    judged = [name for name in names if readable.is_accuracy(name) or "loss" in name.lower()]
    # those of slimming are compared further below
    return min((name for name in judged if not name.startswith("slim/")), key=rank, default="")


def final(run: RecordedRun | None, name: str) -> float | None:
    """A metric at the end: among the results, or the last one that was logged."""
    if run is None or not name:
        return None
    found = number(run.run.results, name)
    return found if found is not None else last(run, name)


def gains(run: RecordedRun, dense: RecordedRun | None) -> dict[str, list[Gain]]:
    """The figures of the run beside those of a dense one, by what they are about; none without figures."""
    found = {
        "Results and weights": [*_metric_gains(run, dense), *_weight_gains(run)],
        "FLOPs, memory and time": [*_flops_gains(run, dense), *_other_gains(run, dense)],
    }
    return {title: given for title, given in found.items() if given}


def _metric_gains(run: RecordedRun, dense: RecordedRun | None) -> list[Gain]:
    logged = metrics(run)
    main = main_metric(run)
    # results of tests, then of validations; the figures that methods add have their curves
    named = sorted({n for n in (*run.run.results, *logged) if n.lower().startswith(("test", "val"))}, key=_order)
    found = []
    for name in dict.fromkeys([main, *named][:8] if main else named[:8]):
        own, other = final(run, name), final(dense, name)
        if own is None:
            continue
        difference = "" if other is None else _difference(name, own, other)
        found.append(Gain(name, readable.score(name, own), _text(name, other), difference))
        top = best(run, name) if name in logged and readable.is_accuracy(name) else None
        if top is not None and top != own:
            other = None if dense is None else best(dense, name)
            difference = "" if other is None else _difference(name, top, other)
            found.append(Gain(f"{name}, best", readable.score(name, top), _text(name, other), difference))
    return found


def _order(name: str) -> tuple[bool, bool, str]:
    return not name.lower().startswith("test"), not readable.is_accuracy(name), name


def _difference(name: str, own: float, other: float) -> str:
    """A metric's difference from that of a dense run: of accuracies in points of percent."""
    if own == other:
        return "the same"
    points = readable.is_accuracy(name) and 0 <= own <= 1 and 0 <= other <= 1
    text = f"{100 * (own - other):+.2f} points" if points else f"{own - other:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}", 1)


def _text(name: str, value: float | None) -> str:
    return "" if value is None else readable.score(name, value)


def _weight_gains(run: RecordedRun) -> list[Gain]:
    sparse = sum(layer.size for layer in run.run.layers if layer.sparse)
    whole = sum(layer.size for layer in run.run.layers)
    total, active, mean = last(run, "sparsity/total"), active_weights(run), last(run, "active/mean")
    found = []
    if total is not None and sparse:
        left = round((1 - total) * sparse)
        found.append(Gain("weights in the sparse layers", f"{left:,}", f"{sparse:,}", readable.fewer(left, sparse)))
    if active is not None:
        found.append(Gain("weights in the whole model", f"{active:,}", f"{whole:,}", readable.fewer(active, whole)))
    if mean is not None:
        found.append(
            Gain("active weights, mean over training", f"{round(mean):,}", f"{whole:,}", readable.fewer(mean, whole))
        )
    return found


def _flops_gains(run: RecordedRun, dense: RecordedRun | None) -> list[Gain]:
    texts = {
        "inference": "FLOPs of one sample at inference",
        "inference_sparse_layers": "… in the sparse layers",
        "slim": "… of the slim network",
        "training": "FLOPs of the training",
        "training_sparse_layers": "… in the sparse layers",
    }
    found = []
    for key, text in texts.items():
        own, other = last(run, f"flops/{key}"), last(run, f"flops/{key}_dense")
        if key == "slim":
            # before slimming every weight was multiplied, zero or not: that is the dense network
            own, other = (channel_costs(run, when).get("flops") for when in ("after", "before"))
        if own is not None:
            beside = "" if other is None else readable.count(other)
            found.append(Gain(text, readable.count(own), beside, readable.fewer(own, other)))
    parts = {"passes": "of these, in passes over data", "similarities": "beside these, for similarities of neurons"}
    for key, text in parts.items():
        own = last(run, f"flops/{key}")
        if own:
            found.append(Gain(text, readable.count(own)))
    trained = None if dense is None else last(dense, "flops/training")
    own = last(run, "flops/training")
    if own is not None and trained is not None:
        text = "FLOPs of the training, beside the dense run"
        found.append(Gain(text, readable.count(own), readable.count(trained), readable.fewer(own, trained)))
    return found


def _other_gains(run: RecordedRun, dense: RecordedRun | None) -> list[Gain]:
    found = []
    for key, text in MEMORY.items():
        own, other = last(run, f"bytes/{key}"), None if dense is None else last(dense, f"bytes/{key}")
        if own or (own is not None and other):
            texts = (readable.size(own), "" if other is None else readable.size(other))
            found.append(
                Gain(f"memory in training: {text}", *texts, readable.fewer(own, other, words=("less", "more")))
            )
    duration, other = last(run, "seconds"), None if dense is None else last(dense, "seconds")
    if duration is not None:
        texts = (readable.seconds(duration), "" if other is None else readable.seconds(other))
        # without a ratio: two runs seldom had their machine to themselves alike
        found.append(Gain("time of the training", *texts))
    before, after = (channel_costs(run, when).get("latency") for when in ("before", "after"))
    if before is not None and after is not None:
        change = readable.fewer(after, before, words=("faster", "slower"))
        found.append(
            Gain(
                f"latency{_batch_of(run)}, slim beside masked",
                readable.milliseconds(after),
                readable.milliseconds(before),
                change,
            )
        )
    return found


def channel_costs(run: RecordedRun, when: str) -> Mapping[str, float]:
    """``parameters``, ``flops`` (of one sample) and ``latency`` of the network ``"before"`` or ``"after"`` slimming, those that
    are known."""
    found = run.run.channels.get(when)
    known: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}
    costs = {key: number(known, key) for key in ("parameters", "flops", "latency")}
    return {key: value for key, value in costs.items() if value is not None}


def tiles(run: RecordedRun, dense: RecordedRun | None) -> list[tuple[str, str, str]]:
    """The main figures: name, value, and what stands beside it."""
    name = main_metric(run)
    own, other = final(run, name), final(dense, name)
    found = [(name or "accuracy", readable.score(name, own) if name else readable.UNKNOWN, "")]
    if own is not None and other is not None:
        found = [(name, readable.score(name, own), f"dense run: {readable.score(name, other)}")]
    total, model = last(run, "sparsity/total"), last(run, "sparsity/model")
    whole = "" if model is None else f"of the sparse layers; whole model {readable.share(model)}"
    found.append(("zeros", readable.share(total), whole))
    for key, text in {"inference": "inference FLOPs", "training": "training FLOPs"}.items():
        spent, reference = last(run, f"flops/{key}"), last(run, f"flops/{key}_dense")
        beside = [readable.fewer(spent, reference, "dense")]
        if key == "inference" and (slim := channel_costs(run, "after").get("flops")) is not None:
            beside.append(f"slim network: {readable.count(slim)}")
        found.append((text, readable.count(spent), "; ".join(filter(None, beside))))
    known = [value for key in MEMORY if (value := last(run, f"bytes/{key}")) is not None]
    parts = ", ".join(
        f"{text} {readable.size(last(run, f'bytes/{key}'))}"
        for key, text in MEMORY.items()
        if last(run, f"bytes/{key}")
    )
    found.append(("memory in training", readable.size(sum(known)) if known else readable.UNKNOWN, parts))
    return [*found, _latency_tile(run)]


def _latency_tile(run: RecordedRun) -> tuple[str, str, str]:
    before, after = channel_costs(run, "before"), channel_costs(run, "after")
    measured = after.get("latency", number(run.run.results, "slim/latency"))
    if measured is None:
        return ("latency", "not measured", "slimming measures it (slim=true)")
    masked = f"masked: {readable.milliseconds(before['latency'])}" if "latency" in before else ""
    return (f"latency{_batch_of(run)}, slim network", readable.milliseconds(measured), masked)


def _batch_of(run: RecordedRun) -> str:
    """How many samples a latency is of, as words that follow it; empty where it is not known."""
    samples = number(run.run.channels, "samples")
    return "" if samples is None else f" of {samples:,g} samples"
