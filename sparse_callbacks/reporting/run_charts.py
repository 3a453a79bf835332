"""The curves of a report: sparsity and metrics, what moved, what was spent, dead units."""

import re
from collections.abc import Sequence

from sparse_callbacks.core.record.record_file import RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.charts import Chart, Line
from sparse_callbacks.reporting.series import curve, events_of, last, metrics, stayed_zero
from sparse_callbacks.reporting.style import INK, PALETTE, colour


def progress_charts(run: RecordedRun, dense: RecordedRun | None) -> list[Chart]:
    """Sparsity, accuracies, losses, and what else the run has logged, over time."""
    own = colour(run.run.method)
    zeros = [Line("sparse layers", run, "sparsity/total", own), Line("whole model", run, "sparsity/model", INK, ":")]
    charts = [
        Chart("sparsity", "Sparsity", zeros, _sparsity_caption(run), readable.share, (0.0, 1.03)),
    ]
    left = metrics(run)
    accuracies = [name for name in left if readable.is_accuracy(name)]
    losses = [name for name in left if "loss" in name.lower()]
    if accuracies:
        shares = all(v is None or 0 <= v <= 1 for name in accuracies for v in curve(run, name)[1])
        lines = _metric_lines(run, dense, accuracies)
        charts.append(Chart("accuracy", "Accuracy", lines, "", readable.share if shares else readable.tick))
    if losses:
        charts.append(Chart("loss", "Loss", _metric_lines(run, dense, losses)))
    rates = [name for name in left if _is_rate(name)]
    if rates:
        charts.append(Chart("learning_rate", "Learning rate", _metric_lines(run, dense, rates), limits=(0.0, None)))
    others = [name for name in left if name not in {*accuracies, *losses, *rates}]
    # more than a handful would bury what the page is about; the record has them
    others.sort(key=lambda name: "grad" not in name.lower())
    for name in others[:4]:
        lowest = 0.0 if all(value >= 0 for value in curve(run, name)[1]) else None
        charts.append(Chart(name, name, _metric_lines(run, dense, [name]), limits=(lowest, None)))
    return charts


def _sparsity_caption(run: RecordedRun) -> str:
    total, model = last(run, "sparsity/total"), last(run, "sparsity/model")
    caption = "The share of weights that are zero"
    if total is None or model is None:
        return f"{caption}."
    return f"{caption}; at the end {readable.share(total)} in the sparse layers and {readable.share(model)} in the whole model."


def _is_rate(name: str) -> bool:
    """Whether a metric is a learning rate: one may be logged under several names, and each group of parameters has its own."""
    return re.fullmatch(r"(.*/)?(lr|learning_rate)([-_/].*)?", name, re.IGNORECASE) is not None


def _metric_lines(run: RecordedRun, dense: RecordedRun | None, names: Sequence[str]) -> list[Line]:
    """The curves of metrics: those of the dense run are dashed in the same order, dark."""
    # metrics of validation first: they are what runs are compared by; those of five guesses (acc5, top5) last
    ordered = sorted(names, key=lambda name: (name[-1:].isdigit(), "val" not in name.lower()))[:6]
    own = colour(run.run.method)
    colours = [own, *(c for c in PALETTE if c != own)]
    lines = [_metric_line(name, run, name, colours[i % len(colours)]) for i, name in enumerate(ordered)]
    if dense is not None:
        known = set(metrics(dense))
        compared = [name for name in ordered if name in known][:2]
        lines += [_metric_line(f"dense: {n}", dense, n, INK, "--" if i == 0 else ":") for i, n in enumerate(compared)]
    return lines


def _metric_line(label: str, run: RecordedRun, name: str, shade: str, dashes: str = "-") -> Line:
    events = events_of(run, name)
    # an accuracy or a loss of an epoch is repeated until the next one; a learning rate does stay as it is
    measured = readable.is_accuracy(name) or "loss" in name.lower()
    return Line(label, run, name, shade, dashes, events, repeated=bool(events) or not measured)


def movement_charts(run: RecordedRun) -> list[Chart]:
    """What moved: connections exchanged at each update, how far the masks went, and how old connections are.

    None where nothing has moved: a sentence says it better than lines of zeros.
    """
    if stayed_zero(run, "topology/distance_first"):
        return []
    own = colour(run.run.method)
    others = [c for c in PALETTE if c != own]
    moved = [
        # between updates nothing moves: rows of other events would be zeros between them
        Line("churn", run, "topology/churn", own, events=("update",)),
        Line("distance to the previous mask", run, "topology/distance_previous", others[0], events=("update",)),
    ]
    gone = [
        Line("distance to the first mask", run, "topology/distance_first", own),
        Line("ever active", run, "topology/ever_active", others[1]),
    ]
    ages = [Line("Mean age of active connections", run, "topology/mean_age", own)]
    paths = [Line("Paths from inputs to outputs", run, "topology/paths", own)]
    return [
        Chart(
            "churn", "Connections that moved at an update", moved,
            "Churn: the share of active connections that an update has exchanged. Distance: Jaccard, the share of "
            "connections in either mask that are not in both.",
            readable.share, (0.0, None),
        ),
        Chart(
            "exploration", "How far the masks went", gone,
            "Distance to the first mask (Jaccard), and the share of all weights that were active at some time.",
            readable.share, (0.0, 1.03),
        ),
        Chart(
            "age", "Mean age of active connections", ages,
            "Optimizer steps since a connection was last grown; it rises by one a step where nothing moves.",
            readable.tick, (0.0, None),
        ),
        Chart(
            "paths", "Paths from inputs to outputs", paths,
            "Ways through active connections, one of each layer.", readable.tick, (0.0, None),
        ),
    ]  # fmt: skip


def cost_charts(run: RecordedRun, dense: RecordedRun | None) -> list[Chart]:
    """FLOPs of training so far, and of inference, beside those of a dense network."""
    own = colour(run.run.method)
    trained = [
        Line("this run", run, "flops/training", own),
        Line("the same steps, dense", run, "flops/training_dense", INK, "--"),
    ]
    if dense is not None:
        trained.append(Line("the dense run", dense, "flops/training", INK, ":"))
    inference = [
        Line("this network", run, "flops/inference", own),
        Line("dense network", run, "flops/inference_dense", INK, "--"),
    ]
    return [
        Chart(
            "training_flops", "FLOPs of training so far", trained,
            "Forward and backward passes of all samples, whole model; a multiply-add is two FLOPs.", limits=(0.0, None),
        ),
        Chart(
            "inference_flops", "FLOPs of one sample at inference", inference,
            "What the masks leave of a forward pass, whole model.", limits=(0.0, None),
        ),
    ]  # fmt: skip


def dead_charts(run: RecordedRun) -> list[Chart]:
    """Dead units over time; none where there never was one."""
    if stayed_zero(run, "topology/dead_units"):
        return []
    lines = [Line("Dead units", run, "topology/dead_units", colour(run.run.method))]
    caption = "Units whose connections to inputs are all masked."
    return [Chart("dead_units", "Dead units", lines, caption, limits=(0.0, None))]
