"""Method, optimizer and Trainer from a configuration; every refusal comes before the first batch."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import MissingConfigException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

import sparse_callbacks
from sparse_callbacks import schedules
from sparse_callbacks.tasks import build, recorded_config, run_names
from sparse_callbacks.tasks.classifier import Optim, gradient_norm

Compose = Callable[..., DictConfig]
Run = Callable[..., dict[str, float]]
CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
# methods whose target is no sparsity of their own
GATED = [name for name in METHODS if {"density", "budget"} & set(OmegaConf.load(CONF / "method" / f"{name}.yaml"))]
GATED.append("nm")  # its pattern fixes the sparsity
CURVES = sorted(path.stem for path in (CONF / "schedule").glob("*.yaml") if path.stem != "default")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_the_yaml_spells_out_every_argument_with_its_default(name: str) -> None:
    cfg = OmegaConf.load(CONF / f"method/{name}.yaml")
    parameters = inspect.signature(get_class(cfg.pop("_target_"))).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    # of methods without sparse storage too, which say so in words
    options = {"keep_dense": None, "print_plan": True, "fresh_start": False, "storage": "masked"}
    # one class, with a file for each score
    chosen = {"score": name} if "score" in defaults and name != "early_crop" else {}
    if "base" in cfg:  # a method around another one, whose file spells out what concerns masks
        assert [next(iter(entry), None) for entry in cfg.pop("defaults") if entry != "_self_"] == ["/method@base"]
        del cfg["base"], defaults["base"]
        options = {}
    assert OmegaConf.to_container(cfg) == options | defaults | chosen


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("none", *GATED)])
def test_root_keys_reach_the_method(composed: Compose, name: str) -> None:
    method = build.build_method(composed(f"method={name}", "sparsity=0.7", "seed=5"))
    assert method is not None
    assert method.target_sparsity == 0.7
    assert method.seed == 5
    assert build.build_method(composed(f"method={name}")).target_sparsity == 0.9  # type: ignore[union-attr]


def test_a_method_around_another_one_gets_it_from_the_configuration(composed: Compose) -> None:
    around: Any = build.build_method(
        composed(
            "method=sup_tickets",
            "method@method.base=set",
            "method.base.drop_fraction=0.2",
            "method.cycles=2",
            "sparsity=0.7",
        )
    )
    assert isinstance(around, sparse_callbacks.SupTickets)
    assert isinstance(around.base, sparse_callbacks.SET)
    assert (around.base.drop_fraction, around.drop_fraction, around.cycles, around.sparsity) == (0.2, 0.5, 2, 0.7)
    given = [("seed=4", 4), ("method.seed=5", 5), ("method.base.seed=6", 6)]
    for override, seed in given:
        assert build.build_method(composed("method=sup_tickets", override)).seed == seed  # type: ignore[union-attr]
    curved: Any = build.build_method(composed("method=sup_tickets", "schedule=linear"))
    assert str(curved.base.drop_fraction) == "linear(0.3, 0.0)"
    assert curved.drop_fraction == 0.5
    with pytest.raises(ValueError, match=r"method@method\.base=none, and SupTickets trains by the method in its base"):
        build.build_method(composed("method=sup_tickets", "method@method.base=none"))
    with pytest.raises(ValueError, match="base=GMP is not a method that drops weights"):
        build.build_method(composed("method=sup_tickets", "method@method.base=gmp"))


@pytest.mark.parametrize("name", GATED)
def test_a_sparsity_for_a_method_with_another_target_is_refused(composed: Compose, name: str) -> None:
    assert build.build_method(composed(f"method={name}", "seed=5")).seed == 5  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"[Gg]ive (density|budget|another pattern)="):
        build.build_method(composed(f"method={name}", "sparsity=0.7"))


def test_method_keys_reach_the_method(composed: Compose) -> None:
    rigl = build.build_method(
        composed("method=rigl", "method.drop_fraction=0.2", "method.every=7", "method.seed=9", "seed=1")
    )
    assert isinstance(rigl, sparse_callbacks.RigL)
    assert (rigl.drop_fraction, rigl.every, rigl.seed) == (0.2, 7, 9)
    patterned = build.build_method(composed("method=rigl", "method.pattern=fan_in/64", "method.candidates=2.0"))
    assert (patterned.pattern, patterned.candidates) == ("fan_in/64", 2.0)  # type: ignore[union-attr]
    stored = build.build_method(
        composed("method=set", "method.storage={model.1.*: grouped, *: masked}", "method.group=8")
    )
    assert (stored.storage, stored.group, stored.rows) == ({"model.1.*": "grouped", "*": "masked"}, 8, None)  # type: ignore[union-attr]
    masked = build.build_method(composed("method=gap_parallel", "method.storage=auto"))
    assert masked is not None
    assert "makes layers dense in turn" in str(
        masked.plan(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))))
    )
    assert "storage='auto'" in repr(masked)
    assert build.build_method(composed("method=none")) is None


@pytest.mark.parametrize("curve", CURVES)
def test_a_schedule_changes_the_curve_and_keeps_the_number(composed: Compose, curve: str) -> None:
    rigl = build.build_method(composed("method=rigl", "method.drop_fraction=0.2", f"schedule={curve}"))
    assert rigl.drop_fraction == schedules.with_curve(curve, 0.2)  # type: ignore[union-attr]
    gmp = build.build_method(composed("method=gmp", "sparsity=0.7", f"schedule={curve}"))
    assert gmp.sparsity == schedules.with_curve(curve, 0.7, rising=True)  # type: ignore[union-attr]
    plain = build.build_method(composed("method=set", f"schedule={curve}"))
    assert plain.drop_fraction == schedules.with_curve(curve, 0.3)  # type: ignore[union-attr]


def test_no_schedule_is_the_methods_own(composed: Compose) -> None:
    cfg = composed("method=rigl", "schedule=default")
    assert build.build_method(cfg).drop_fraction == 0.3  # type: ignore[union-attr]
    cfg.schedule = None
    assert build.build_method(cfg).drop_fraction == 0.3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=none", "sparsity=0.9"), "sparsity=0.9, but method=none trains dense.*Choose a method"),
        (("method=none", "schedule=cosine"), "schedule=cosine, but method=none trains dense"),
        (("method=static", "schedule=linear"), "schedule=linear: Static has no number that moves"),
        (("method=rigl", "schedule=linear", "method.drop_fraction='cosine(0.2)'"), "both choose a curve"),
        (
            ("method=rigl", "sparsity=0.9", "method.sparsity=0.8"),
            "sparsity=0.9 and method.sparsity=0.8 both set the target of RigL",
        ),
        (("method=rigl", "sparsity=1.0"), r"sparsity=1.0 is not in \[0, 1\)"),
        (("method=rigl", "method.every=1000"), "every"),
        (("method=rigl", "method.start=0.8", "method.stop=0.2"), "stop"),
        (("method=rigl", "method.include=[nothing*]"), "matches no parameter"),
        (("method=static", "method.pattern=fan_in/none"), "pattern='fan_in/none' is not known"),
        (("method=set", "method.pattern=64"), "pattern=64 is not known"),
        (("method=rigl", "method.storage=dense"), "storage='dense' is not known"),
        (("method=gmp", "method.storage=sparse"), r"storage='sparse': GMP starts dense.*storage='masked'"),
        (("method=smcp", "method.storage={model.1.*: grouped}"), "SMCP has a gate for every channel.*storage='masked'"),
        (("method=set", "method.group=0"), "group=0 is not a number of output rows"),
        (("method=static", "method.rows=many"), "rows='many' is not the number of rows"),
        (
            ("method=set", "method.storage=sparse", "method.pattern=fan_in/4"),
            "pattern='fan_in/4' is one of masked",
        ),
        (("method=rigl", "method.candidates=-1"), "candidates=-1 is not a number above 0"),
        (("optim.name=lbfgs",), "optim.name='lbfgs' is not known. Choose one of sgd, adam, adamw"),
        (("optim.lr_schedule=plateau",), "optim.lr_schedule='plateau' is not known"),
        (("optim.lr=0",), "optim.lr=0 is not positive"),
        (("trainer.max_epochs=-1",), "needs the length of the run, and this run has no end"),
        (("early_stopping=0",), "early_stopping=0 is not a number of epochs"),
        (("test=first",), "test='first' does not name a network"),
    ],
)
def test_refusals_before_the_first_batch(
    run: Run, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("a batch was trained")

    monkeypatch.setattr("sparse_callbacks.tasks.classifier.Classifier.training_step", never)
    with pytest.raises(ValueError, match=message):
        run(*overrides)


@pytest.mark.parametrize(("group", "known"), [("method", METHODS), ("schedule", CURVES)])
def test_an_unknown_choice_lists_the_known_ones(composed: Compose, group: str, known: list[str]) -> None:
    with pytest.raises(MissingConfigException) as caught:
        composed(f"{group}=riggel")
    assert all(name in str(caught.value) for name in known)


def test_a_missing_checkpoint(run: Run) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=nowhere.ckpt is not there.*checkpoints/last.ckpt"):
        run("ckpt_path=nowhere.ckpt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(run: Run) -> None:
    with pytest.raises(ValueError, match=r"torch sees no GPU. Use trainer=cpu"):
        run("trainer=gpu")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_experiments_compose_and_their_method_fits_the_model(composed: Compose, name: str) -> None:
    side_by_side = "two_jobs" in (CONF / f"experiment/{name}.yaml").read_text()  # by a launcher that is an extra
    untrained = ["model.pretrained=false"] if name == "my_photos" else []  # no test waits for a download
    cfg = composed(f"experiment={name}", *(["hydra/launcher=basic"] if side_by_side else []), *untrained)
    method = build.build_method(cfg)
    if method is None:
        assert name == "shrinkbench_dense"
        return
    images = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    shapes = {**images, "madelon": (500,), "image_folder": (3, 64, 64)}
    shape = shapes[cfg.data.get("name") or cfg.data._target_.rpartition(".")[2]]
    module = build.build_module(cfg, SimpleNamespace(input_shape=shape, num_classes=10))  # type: ignore[arg-type]
    plan = method.plan(module)
    assert 0.5 < plan.total < 1 or not method.plans_counts


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers(composed: Compose, name: str) -> None:
    cfg = composed(f"optim={name}", "optim.lr=0.03")
    optim = build.build_module(cfg, build.instantiate(cfg.data)).optim
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.optimizer([weight])
    assert type(optimizer).__name__.lower() == name
    assert optimizer.defaults["lr"] == 0.03
    assert optimizer.defaults["fused"] is True


def test_learning_rate_curves() -> None:
    def total() -> float:
        return 100.0

    assert [Optim(lr_schedule="cosine").factor(s, total) for s in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    steps = Optim(lr_schedule="steps", milestones=(0.5, 75), gamma=0.1)
    assert [steps.factor(s, total) for s in (0, 49, 50, 74, 75)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    warm = Optim(lr_schedule="constant", warmup=3)
    assert [warm.factor(s, total) for s in (0, 1, 2, 3, 90)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_gradient_norm_by_hand() -> None:
    a, b, frozen = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    norm = gradient_norm([a, b, frozen])
    assert norm is not None
    assert math.isclose(float(norm), 5.0)
    assert gradient_norm([frozen]) is None


@pytest.mark.parametrize("name", ["cpu", "ddp"])
def test_trainer_groups_build(composed: Compose, name: str, tmp_path: Path) -> None:
    cfg = composed(f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=1", f"output_dir={tmp_path}")
    trainer = build.build_trainer(cfg, [], [])
    assert isinstance(trainer, pl.Trainer)
    assert trainer.max_epochs == 30


def test_curvature_is_logged_where_the_root_key_says_how_often(run: Run, tmp_path: Path) -> None:
    run("curvature=5", "logger=[csv]", "report=false")
    (path,) = (tmp_path / "run").rglob("metrics.csv")
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    step, largest = header.index("step"), header.index("curvature/max")
    assert [int(row[step]) for row in rows if row[largest]] == [0, 5, 10, 15, 20, 25]
    with pytest.raises(ValueError, match="curvature=0 is not a number of optimizer steps between measurements"):
        run("curvature=0", folder="other")


def test_a_distribution_may_be_an_object(composed: Compose) -> None:
    cfg = composed("method=rigl", "method.distribution={_target_:support.shares.BySize,least:0.3}")
    method = build.build_method(cfg)
    assert method is not None
    assert method.arguments["distribution"] == "BySize(0.3)"
    assert run_names.target_text(method) == "bysize"
    assert recorded_config.target_sparsity(method) is None  # no model is known
    model = torch.nn.Linear(20, 10)
    assert 0.3 < method.plan(model).total < 0.8
    with pytest.raises(ValueError, match=r"sparsity=0.7 and distribution=BySize\(0.3\) both say"):
        build.build_method(
            composed("method=rigl", "sparsity=0.7", "method.distribution={_target_:support.shares.BySize,least:0.3}")
        )


def test_spdy_from_the_command_line(composed: Compose, run: Run) -> None:
    """FLOPs of the first batch of data, as the module of `train.py` has no example input."""
    spdy = "method.distribution={_target_:sparse_callbacks.Spdy,budget:0.3}"
    method = build.build_method(composed("method=gmp", spdy))
    assert method is not None
    assert method.arguments["distribution"] == "Spdy(budget=0.3, cost='flops', error='magnitude')"
    sized = build.build_method(composed("method=gmp", spdy.replace("0.3", "0.3,input:[1,8,8]")))
    assert "input=(1, 8, 8)" in sized.arguments["distribution"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="both say how many weights"):
        build.build_method(composed("method=gmp", spdy, "sparsity=0.8"))
    metrics = run("method=gmp", spdy)
    # a network of linear layers alone, each weight of which is used once
    assert 0.7 <= metrics["sparsity/total"] < 0.75
