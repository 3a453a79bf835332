"""Measures the test accuracy of every method over several seeds; one table for each setting.

    python benchmarks/accuracy.py                                  # scikit-learn's digits, seconds a run
    python benchmarks/accuracy.py --table lenet5 --root FOLDER     # LeNet-5 on Fashion-MNIST, about a minute a run

FOLDER holds torchvision's files (see data.root in conf/data/fashion_mnist.yaml). Each run is `python train.py` with the
overrides of its row, the overrides above its table and a seed. The file is written again after each run, and a JSON file
of all figures beside it: with `--go-on` the runs in it are not repeated (see training_runs.py).
"""

import os
import platform
import shlex
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytorch_lightning as pl
import torch
from training_runs import ROOT, Metrics, figures_of, options_of_runs, results

ERK = "method.distribution=erdos_renyi_kernel"
LENET5 = "model=lenet5 data=fashion_mnist trainer.max_epochs=12"
LENET_300_100 = "model=lenet_300_100 data=fashion_mnist trainer.max_epochs=12"
CONVOLUTIONS = "model=lenet5 model._target_=small_networks.three_convolutions data=fashion_mnist trainer.max_epochs=4"
# Lee et al. 2019, section 5 and appendix A, and their code: Glorot's initial weights, batches of 100, no Nesterov momentum
SNIP_AS_PUBLISHED = (
    "model=mlp model.hidden=[300,100] model.init=xavier_uniform data=mnist optim.lr=0.1 optim.nesterov=false "
    "optim.weight_decay=5e-4 optim.lr_schedule=steps optim.milestones=[25000,50000] trainer.max_epochs=100"
)


# that of channels.py, with images pooled to 14 x 14, as in channel_criteria.py
RESNET20 = (
    "model=resnet20 data=fashion_mnist data._target_=pooled_images.halved data.batch_size=128 optim.lr=0.1 "
    "trainer.max_epochs=4 trainer.limit_train_batches=0.5"
)


@dataclass(frozen=True)
class Group:
    """Runs under one heading.

    Args:
        title: the heading.
        shared: the overrides of `train.py` that all rows have, as one writes them in a shell.
        rows: the overrides of each row by its name. An override `sparsity=...` in `shared` is left out for
            `method=none`.
        search: whether the group shows how the settings of a row were chosen: a line of validation accuracies of the
            first seed instead of a table.
    """

    title: str
    shared: str
    rows: Mapping[str, str]
    search: bool = False


@dataclass(frozen=True)
class Report:
    """A file of results.

    Args:
        title: the heading of the file.
        about: what the runs have in common.
        command: the command that writes the file.
        out: the name of the file in benchmarks/results.
        groups: the groups of runs, in their order.
        needs_root: whether the data set is read from a folder.
    """

    title: str
    about: str
    command: str
    out: str
    groups: tuple[Group, ...]
    needs_root: bool = False


DIGITS_ROWS = {name: f"method={name}" for name in ("none", "static", "set", "snfs", "rigl", "gmp", "dpf")} | {
    "gap": "method=gap method.partitions=3",  # these networks have three layers
    "ctre": "method=ctre",
}
# methods that start sparse, whose fresh weights can be made larger
RESCALED_ROWS = {
    f"{name}, {kind}": f"{DIGITS_ROWS[name]} method.rescale={kind}"
    for name, kind in product(("static", "set", "snfs", "rigl", "gap", "ctre"), ("layer", "fan_in"))
}
LENET5_ROWS = {
    "dense": "method=none",
    "GMP": f"method=gmp {ERK}",
    "RigL": f"method=rigl {ERK}",
    "DPF, global": "method=dpf",
    "DPF, by layer": f"method=dpf {ERK}",
    "GaP": f"method=gap {ERK} method.partitions=2 method.rounds=2 method.init=random",
}
# those that begin sparse, as LeNet-5 has no norms
LENET5_RESCALED_ROWS = {
    f"{name}{words}": f"{LENET5_ROWS[name]}{overrides}"
    for name in ("RigL", "GaP")
    for words, overrides in (("", ""), (", rescaled", " method.rescale=layer"))
}
STARTS_ROWS = {
    "dense": "method=none",
    **{
        f"{name}{words}": f"method={name.lower()}{overrides}"
        for name in ("Static", "SET", "RigL")
        for words, overrides in (("", ""), (", rescaled", " method.rescale=layer"))
    },
    "random at start": "method=snip method.score=random",
    "magnitude at start": "method=snip method.score=magnitude",
    "SNIP": "method=snip",
    "GraSP": "method=grasp",
    "SynFlow": "method=synflow",
    "EarlyCroP": "method=early_crop",
    "GMP": "method=gmp",
    "GMP, by layer": f"method=gmp {ERK}",
    "DPF": "method=dpf",
    "DPF, by layer": f"method=dpf {ERK}",
}
AT_ONCE = "method=gmp \"method.pattern='2:4'\" method.every=1"  # of 860 steps
PATTERNS_ROWS = {
    "dense": "method=none",
    "Static 2:4": "method=static \"method.pattern='2:4'\"",
    "magnitude 2:4, at once in the last step": f"{AT_ONCE} method.start=858 method.stop=859",
    "magnitude 2:4, at once, half of the steps after it": f"{AT_ONCE} method.start=430 method.stop=431",
    "GMP, on a ramp to 2:4": "method=gmp \"method.pattern='2:4'\"",
    "NM 2:4": "method=nm",
    "NM 1:4": "method=nm \"method.pattern='1:4'\"",
    "NM 2:4, soft projection": "method=nm method.projection=soft",
    "NM transposable 2:4": "method=nm \"method.pattern='transposable 2:4'\"",
    "RigL 2:4": "method=rigl \"method.pattern='2:4'\"",
    "RigL, 50 % unstructured": "method=rigl sparsity=0.5",
}
# their code draws the weights that are left anew
SNIP_ROWS = {
    "dense": "method=none",
    "SNIP": "method=snip",
    "SNIP, fresh weights": "method=snip method.reinit_after=true",
}
GAP_TRIED = {
    f"{init}, {rounds} x {partitions}": f"method=gap {ERK} method.partitions={partitions} method.rounds={rounds} method.init={init}"
    for init, rounds, partitions in product(("random", "magnitude"), (1, 2), (2, 3, 4))
}
REPORTS = {
    "digits": Report(
        "Accuracy on scikit-learn's digits",
        "1,797 images, one fixed split (450 test images, so 0.22 points an image).",
        "python benchmarks/accuracy.py",
        "accuracy.md",
        (
            Group("The default network (64-256-256-10), 90 % zeros", "sparsity=0.9", DIGITS_ROWS),
            Group("LeNet-300-100, 98 % zeros in every layer", "experiment=lenet_300_100_digits", DIGITS_ROWS),
            Group("The same, with rescaled weights", "experiment=lenet_300_100_digits", RESCALED_ROWS),
        ),
    ),
    "lenet5": Report(
        "LeNet-5 on Fashion-MNIST",
        "55,000 training, 5,000 validation and 10,000 test images. Every method has the same 12 epochs (6,600 steps of "
        "100 images), SGD "
        "from 0.05 with a cosine to 0; the optimizer and the cosine start anew with each phase of GaP. GaP alone was "
        "tuned (partitions, "
        "rounds, first masks; of two that tie, the one with the default masks); the others have the defaults of "
        "conf/method and the "
        "distribution in their row. A tried setting near 10 % ended with a dead network: its loss is ln 10.",
        "python benchmarks/accuracy.py --table lenet5 --root FOLDER",
        "lenet5_fashion_mnist.md",
        (
            Group(
                "GaP's settings (first masks, rounds x partitions), one seed, 95 %",
                f"{LENET5} sparsity=0.95",
                GAP_TRIED,
                search=True,
            ),
            Group("95 % zeros", f"{LENET5} sparsity=0.95", LENET5_ROWS),
            Group("98 % zeros", f"{LENET5} sparsity=0.98", LENET5_ROWS),
        ),
        needs_root=True,
    ),
    "lenet5_rescaled": Report(
        "LeNet-5 on Fashion-MNIST with rescaled weights",
        "In the setting of lenet5_fashion_mnist.md the methods whose first masks are sparse, with weights as the network was made and "
        "with `rescale=layer`: LeNet-5 has no norms that would make up for what masks take of its signals.",
        "python benchmarks/accuracy.py --table lenet5_rescaled --root FOLDER",
        "lenet5_rescaled.md",
        tuple(Group(f"{100 * s:g} % zeros", f"{LENET5} sparsity={s:g}", LENET5_RESCALED_ROWS) for s in (0.95, 0.98)),
        needs_root=True,
    ),
    "starts": Report(
        "How a sparse network begins",
        "Fashion-MNIST: 55,000 training, 5,000 validation and 10,000 test images. Every row has the same epochs of 550 steps "
        "of 100 images, SGD from 0.05 with a cosine to 0, and the defaults of conf/method: shares of layers too are those of each "
        "method. Rescaled: `rescale=layer`. EarlyCroP trains densely until it prunes, GMP and DPF reach their sparsity on the way.",
        "python benchmarks/accuracy.py --table starts --root FOLDER",
        "starts.md",
        (
            *(
                Group(f"LeNet-300-100, {100 * s:g} % zeros, 12 epochs", f"{LENET_300_100} sparsity={s:g}", STARTS_ROWS)
                for s in (0.9, 0.95, 0.98, 0.99)
            ),
            *(
                Group(
                    f"Three convolutions with batch norms, {100 * s:g} % zeros, 4 epochs",
                    f"{CONVOLUTIONS} sparsity={s:g}",
                    STARTS_ROWS,
                )
                for s in (0.9, 0.98)
            ),
        ),
        needs_root=True,
    ),
    "sup_tickets": Report(
        "Sup-tickets around RigL",
        "Fashion-MNIST, in the settings of starts.md: the rows differ in the last tenth of the steps, in which sup-tickets have three "
        "cycles and their merge.",
        "python benchmarks/accuracy.py --table sup_tickets --root FOLDER",
        "sup_tickets.md",
        tuple(
            Group(title, f"{shared} sparsity={s:g}", {"RigL": "method=rigl", "RigL, sup-tickets": "method=sup_tickets"})
            for s in (0.9, 0.98)
            for title, shared in (
                (f"LeNet-300-100, {100 * s:g} % zeros, 12 epochs", LENET_300_100),
                (f"Three convolutions with batch norms, {100 * s:g} % zeros, 4 epochs", CONVOLUTIONS),
            )
        ),
        needs_root=True,
    ),
    "patterns": Report(
        "Patterns of N:M",
        "ResNet-20 on Fashion-MNIST with images pooled to 14 x 14 (pooled_images.py), 55,000 training images of which an epoch sees "
        "half. All rows have the same epochs, SGD from 0.1 with a cosine to 0; layers that do not divide into groups of four stay "
        "dense: the first convolution.",
        "python benchmarks/accuracy.py --table patterns --root FOLDER",
        "patterns.md",
        (Group("ResNet-20, four half epochs", RESNET20, PATTERNS_ROWS),),
        needs_root=True,
    ),
    "snip": Report(
        "SNIP in the setting of its paper",
        "LeNet-300-100 on MNIST: 55,000 images train (the paper's 60,000 less those that validate) in batches of 100 for 100 epochs, "
        "SGD from 0.1, a tenth of it after 25,000 steps and again after 50,000. Published (Lee et al. 2019, table 1): 98.4 % at 95 % "
        "zeros and 97.6 % at 98 %, as errors of 1.6 and 2.4 %. Their code draws the weights that are left anew, which the last rows "
        "do, prunes biases too, trains on 54,000 images, and reports the best of ten late checkpoints by the test set; here the last "
        "network is tested, whatever it gives.",
        "python benchmarks/accuracy.py --table snip --root FOLDER",
        "snip_mnist.md",
        tuple(Group(f"{100 * s:g} % zeros", f"{SNIP_AS_PUBLISHED} sparsity={s:g}", SNIP_ROWS) for s in (0.95, 0.98)),
        needs_root=True,
    ),
}


def overrides(shared: str, row: str, seed: int) -> tuple[str, ...]:
    """The overrides of `train.py` for one run, without the folder of its data.

    Dense runs of two sparsities have the same overrides, so that they are made only once.
    """
    words = [*shlex.split(row), *shlex.split(shared)]
    if "method=none" in words:
        words = [word for word in words if not word.startswith("sparsity=")]
        if any(word.startswith("experiment=") for word in words):
            # the experiment has a sparsity too, which a dense run refuses
            words.append("sparsity=null")
    return (*words, f"seed={seed}")


def runs(report: Report, seeds: int) -> list[tuple[str, ...]]:
    """The overrides of all runs, each once: the searches, then all rows with the first seed, then with the next one."""
    found = []
    for group in report.groups:
        if group.search:
            found += [overrides(group.shared, row, 0) for row in group.rows.values()]
    for seed in range(seeds):
        for group in report.groups:
            if not group.search:
                found += [overrides(group.shared, row, seed) for row in group.rows.values()]
    return list(dict.fromkeys(found))


def line(name: str, row: str, found: Sequence[Metrics]) -> str:
    """One row of a table, with accuracies in percent; the spread is the standard deviation of a sample."""
    if not found:
        return f"| {name} | not run yet | | | | | | | `{row}` |"
    tested = [100 * metrics["test/acc"] for metrics in found]
    validated = [100 * metrics["val/acc"] for metrics in found]
    spread = f"{statistics.stdev(tested):.2f}" if len(tested) > 1 else ""
    sparsities = [100 * metrics["sparsity/total"] for metrics in found]
    zeros, most_zeros = f"{min(sparsities):.2f}", f"{max(sparsities):.2f}"
    if most_zeros != zeros:
        zeros = f"{zeros} to {most_zeros}"
    seconds = statistics.mean(metrics["seconds"] for metrics in found)
    return (
        f"| {name} | {statistics.mean(tested):.2f} % | {spread} | {min(tested):.2f} to {max(tested):.2f} % "
        f"| {statistics.mean(validated):.2f} % | {zeros} % | {seconds:.1f} | {len(found)} | `{row}` |"
    )


def section(group: Group, found: Mapping[tuple[str, ...], Metrics], seeds: int) -> str:
    """A group as Markdown, from the runs that have ended so far."""
    if group.search:
        tried = []
        for name, row in group.rows.items():
            metrics = found.get(overrides(group.shared, row, 0))
            if metrics is not None:
                tried.append((metrics["val/acc"], name))
        best_first = "; ".join(f"{name} {100 * value:.2f} %" for value, name in sorted(tried, reverse=True))
        return f"{group.title}, by validation accuracy: {best_first}."
    # networks that lie beside this script
    path = "PYTHONPATH=benchmarks " if "small_networks." in group.shared else ""
    lines = [
        f"## {group.title}",
        "",
        f"`{path}python train.py {group.shared}` with the overrides of a row and `seed=0` to `seed={seeds - 1}`; the last "
        "network is tested.",
        "",
        "| method | test accuracy, mean | spread | range | validation, mean | zeros | seconds a run | seeds | "
        "overrides |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in group.rows.items():
        of_row = [overrides(group.shared, row, seed) for seed in range(seeds)]
        lines.append(line(name, row, [found[words] for words in of_row if words in found]))
    return "\n".join(lines)


def text(report: Report, found: Mapping[tuple[str, ...], Metrics], seeds: int) -> str:
    """The whole file as Markdown."""
    head = (
        f"# {report.title}\n\n{report.about}\n\nWritten by `{report.command}`. "
        "The spread is the standard deviation over seeds, in points; a seed moves weights, masks and the order of the "
        f"data. Seconds are wall time of training and validation, one thread of {os.cpu_count()} cores, beside other "
        f"jobs: read them roughly. Python {platform.python_version()}, torch {torch.__version__}, "
        f"pytorch-lightning {pl.__version__}, {platform.machine()}."
    )
    return "\n\n".join([head, *(section(group, found, seeds) for group in report.groups)]) + "\n"


def main() -> None:
    readers = ", ".join(name for name, report in REPORTS.items() if report.needs_root)
    parser = options_of_runs(__doc__, root=f"folder of torchvision's files, for --table {readers}")
    parser.add_argument("--table", choices=list(REPORTS), default="digits")
    arguments = parser.parse_args()
    report = REPORTS[arguments.table]
    if report.needs_root and arguments.root is None:
        parser.error(f"--table {arguments.table} needs --root FOLDER")
    if not report.needs_root and arguments.root is not None:
        parser.error(f"--table {arguments.table} reads no files, so it takes no --root FOLDER")
    out = arguments.out or ROOT / "benchmarks" / "results" / report.out
    figures = figures_of(arguments, out)
    root = None if arguments.root is None else str(Path(arguments.root).absolute())
    todo, found = runs(report, arguments.seeds), {}
    with tempfile.TemporaryDirectory() as temporary:
        kept = (arguments.runs or Path(temporary)).absolute()
        for words, metrics in results(todo, root, kept, arguments.jobs, figures):
            found[words] = metrics
            out.write_text(text(report, found, arguments.seeds))
            print(f"{len(found)} of {len(todo)}: {100 * metrics['test/acc']:.2f} % {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
