"""The benchmark of models of other packages: what it measures, on small networks and without those packages."""

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "results" / "zoo.md"
MIB = 1 << 20
PEAKS = """
from zoo_parts.memory import forget_peak, peak
large = bytearray(256 << 20)
peaks = [peak()]
del large
forget_peak()
peaks.append(peak())
small = bytearray(48 << 20)  # more than what an allocator takes from memory that it kept
print(*peaks, peak())
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from zoo_parts import entries, memory, models, outputs, page, peer, processes, slimming, stages, tables

    return SimpleNamespace(
        entries=entries, memory=memory, models=models, outputs=outputs, page=page, peer=peer, processes=processes,
        slimming=slimming, stages=stages, tables=tables,
    )  # fmt: skip


class Net(nn.Module):
    """Eight channels that can go, through a norm; a layer norm that keeps six; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.mix = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mix(self.bn(self.stem(x)).relu()).mean((2, 3))))


@pytest.fixture
def entry(parts: Any) -> Any:
    torch.manual_seed(0)
    model = Net().eval()
    parts.entries.shake(model)
    return parts.entries.Entry(model, parts.entries.images(8), ("head",))


# ---------------------------------------------------------------------- our side


def test_half_of_a_group_goes_and_is_counted(parts: Any, entry: Any) -> None:
    row = parts.slimming.slimmed(entry, 0)
    assert row["equal"]
    assert (row["difference"] < 1e-12, row["precision"], row["cut"]) == (True, "float64", 1)
    # stem 3 x 9 x 8 + 8, norm 2 x 8, mix 8 x 6 + 6, layer norm 2 x 6, head 6 x 5 + 5; of the first three a half, but for the last bias
    core, head = 216 + 8 + 16 + 48 + 6 + 12, 35
    gone = (216 + 8 + 16 + 48) // 2
    assert row["parameters"] == [core + head, core + head - gone]
    assert row["core_left"] == pytest.approx(1 - gone / core)
    # images of 8 x 8 give 6 x 6 places; the head is no part of the core
    places, of_head = 36, 2 * 30
    flops = 2 * places * (216 + 48)
    assert row["core_flops_left"] == pytest.approx(0.5)
    assert row["flops_left"] == pytest.approx((flops / 2 + of_head) / (flops + of_head))
    assert row["seconds"] > 0


def test_what_stays_is_named_with_its_weights(parts: Any, entry: Any) -> None:
    found = {kind["first"]: kind for kind in parts.slimming.slimmed(entry, 0)["stays"]}
    assert set(found) == {"mix", "head"}
    assert "LayerNorm" in found["mix"]["reason"]
    assert found["mix"]["share"] == pytest.approx(48 / 341)
    assert "outputs of the network" in found["head"]["reason"]


def test_reasons_that_differ_in_names_and_numbers_are_of_one_kind(parts: Any) -> None:
    names = {"", "a.0", "a.0.norm", "b", "b.weight"}
    kind = parts.slimming.kind_of
    assert kind("runs into a.0.norm (LayerNorm), of 12", names) == kind("runs into b (LayerNorm), of 7", names)
    assert kind("outputs differ by 1.2e-03", names) == kind("outputs differ by 4e-01", names)
    assert kind("the network fails (IndexError: 7 of a.0)", names) == "the network fails (IndexError)"
    assert kind("runs into a.0 (GroupNorm)", names) != kind("runs into b (LayerNorm)", names)
    assert "Conv2d" in kind("refused by Conv2d", names)


def test_a_model_without_an_open_group_says_why(parts: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)).eval()
    row = parts.slimming.slimmed(parts.entries.Entry(model, parts.entries.numbers(3), ("2",)), 0)
    assert "equal" not in row
    assert {kind["first"] for kind in row["stays"]} == {"0", "2"}
    assert "no open group" in parts.tables.failures([{"name": "x/y", "ours": row, "peer": {}}], "ours")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda net: net.mix.weight.mul_(1.001), "outputs differ"),
        (lambda net: setattr(net, "head", nn.Linear(4, 5)), "RuntimeError"),
    ],
)
def test_a_wrong_network_is_not_equal(
    parts: Any, entry: Any, monkeypatch: pytest.MonkeyPatch, spoil: Any, why: str
) -> None:
    slim = parts.slimming.slim

    @torch.no_grad()
    def wrong(*given: Any) -> Any:
        small, proof = slim(*given)
        spoil(small)
        # only the benchmark's own comparison can find it
        return small, proof

    # the sizes are counted on a pass of the network, which the second one does not take
    monkeypatch.setattr(parts.slimming, "what_is_left", lambda *_: {})
    monkeypatch.setattr(parts.slimming, "slim", wrong)
    row = parts.slimming.slimmed(entry, 0)
    assert not row["equal"]
    assert why in row["why"]


class BatchOfOne(nn.Linear):
    """Takes any batch before it was cut, and a single sample afterwards."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(1, 4) if self.out_features == 2 else x)


def test_other_batch_sizes_are_compared_too(parts: Any) -> None:
    torch.manual_seed(0)
    entry = parts.entries.Entry(
        nn.Sequential(BatchOfOne(4, 4), nn.Linear(4, 2)).eval(), parts.entries.numbers(4), ("1",)
    )
    row = parts.outputs.equality(entry.model, *narrowed(entry.model), entry)
    assert not row["equal"]
    assert "RuntimeError" in row["why"]


def narrowed(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model with the last two of its hidden units masked, and without them."""
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        masked[1].weight[:, 2:] = 0
    small[0].weight, small[0].bias = nn.Parameter(model[0].weight[:2]), nn.Parameter(model[0].bias[:2])
    small[0].out_features, small[1].weight = 2, nn.Parameter(model[1].weight[:, :2])
    return masked, small


@pytest.mark.parametrize("same", ["inputs", "masks"])
def test_outputs_that_say_nothing_are_not_equal(parts: Any, same: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    masked, small = narrowed(model)
    assert parts.outputs.equality(model, masked, small, parts.entries.Entry(model, parts.entries.numbers(4), ()))[
        "equal"
    ]
    still = parts.entries.Entry(model, lambda generator, batch: torch.ones(batch, 4), ())
    row = (
        parts.outputs.equality(model, masked, small, still)
        if same == "inputs"
        else parts.outputs.equality(masked, masked, small, parts.entries.Entry(model, parts.entries.numbers(4), ()))
    )
    assert not row["equal"]
    assert "say nothing" in row["why"]


def test_the_gap_is_infinite_where_values_are_not_comparable(parts: Any) -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert parts.outputs.gap([one], [one * 1.5]) == 0.5
    assert parts.outputs.gap([one], [one[:1]]) == float("inf")
    assert parts.outputs.gap([one], [nan]) == float("inf")
    assert parts.outputs.gap([nan], [nan.clone()]) == 0


def test_constant_weights_become_random_and_others_stay(parts: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(model[2].weight)
    before = model[0].weight.clone()
    parts.entries.shake(model)
    assert torch.equal(model[0].weight, before)
    norm = model[1]
    assert all(t.unique().numel() == 4 for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    assert bool((norm.running_var > 0).all())
    assert model[2].weight.any()


def test_norms_hold_the_statistics_of_inputs(parts: Any, entry: Any) -> None:
    bn, seen = entry.model.bn, []
    momentum = bn.momentum
    parts.entries.settle(entry, batch=16)
    bn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    entry.model(entry.inputs(torch.Generator().manual_seed(0), 16))
    torch.testing.assert_close(bn.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, seen[0].transpose(0, 1).flatten(1).var(1))
    assert (bn.training, bn.momentum) == (False, momentum)


# ---------------------------------------------------------------------- torch-pruning's side


def stand_in(act: Any) -> types.ModuleType:
    """A module in the place of torch-pruning, whose pruner does ``act`` to a model."""
    pruner = lambda model, *_, **__: SimpleNamespace(step=lambda: act(model))  # noqa: E731
    module = types.ModuleType("torch_pruning")
    module.pruner = SimpleNamespace(MagnitudePruner=pruner)  # type: ignore[attr-defined]
    module.importance = SimpleNamespace(MagnitudeImportance=lambda p: None)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("act", "runs", "why"),
    [
        (lambda model: None, True, None),
        (lambda model: setattr(model, "mix", nn.Conv2d(4, 6, 1)), False, "its network fails: RuntimeError"),
        (lambda model: setattr(model, "head", nn.Linear(6, 4)), False, "outputs of other shapes"),
    ],
)
def test_the_pruners_network_runs_or_does_not(
    parts: Any, entry: Any, monkeypatch: pytest.MonkeyPatch, act: Any, runs: bool, why: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", stand_in(act))
    row = parts.peer.pruned(entry)
    assert row["runs"] is runs
    assert why is None or why in row["why"]


def test_a_side_that_fails_leaves_the_other(parts: Any, entry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(entry: Any) -> Any:
        raise IndexError("index 8 is out of bounds")

    monkeypatch.setattr(parts.peer, "pruned", failing)
    rows = dict(parts.stages.measured(lambda: entry, parts.stages.SIDES))
    assert rows["ours"]["equal"]
    assert rows["peer"]["failed"] == "IndexError: index 8 is out of bounds"


# ---------------------------------------------------------------------- processes

SCRIPT = """
import sys, time
sides = sys.argv[sys.argv.index("--sides") + 1 : sys.argv.index("--memory")]
for side in sides:
    if side == "ours" and "hangs" in sys.argv:
        time.sleep(60)
    if side == "ours" and "dies" in sys.argv:
        sys.exit("no more memory")
    print('{"%s": {"seconds": 1}}' % side, flush=True)
"""


def test_a_model_that_hangs_or_dies_stops_nothing(parts: Any, tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(SCRIPT)
    rows = {r["name"]: r for r in parts.processes.all_rows(["hangs", "dies", "works"], 3, 3, 1, script)}
    assert rows["hangs"]["ours"] == {"failed": "no end within 3 s"}
    assert rows["dies"]["ours"] == {"failed": "the process ended with 1: no more memory"}
    assert all(row["peer"] == {"seconds": 1} for row in rows.values())
    assert rows["works"]["ours"] == {"seconds": 1}


def test_memory_beyond_the_limit_is_refused(parts: Any) -> None:
    child = os.fork()
    if child == 0:  # a limit cannot be taken back, so it is set in another process
        code = 1
        try:
            parts.memory.limit_memory(0.25)
            bytearray(1 << 30)
        except MemoryError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_the_peak_is_counted_from_where_it_was_forgotten() -> None:
    """In a process of its own: what this one frees and takes again says nothing of a peak."""
    found = subprocess.run(
        [sys.executable, "-c", PEAKS], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    large, before, after = (int(word) for word in found.stdout.split())
    if before >= large:
        pytest.skip("this system keeps the peak of a process for its whole life")
    assert 47 * MIB < after - before < 72 * MIB


# ---------------------------------------------------------------------- the list and the tables


def test_the_zoo_holds_the_models_that_it_says(parts: Any) -> None:
    names = parts.models.chosen(["*"])
    counts = {library: sum(name.startswith(f"{library}/") for name in names) for library in parts.tables.TITLES}
    assert counts == {"timm": 41, "transformers": 20, "smp": 4, "torchvision": 18, "detection": 3}
    assert parts.models.chosen(["smp/unet*", "timm/dla34"])[0] == "timm/dla34"
    with pytest.raises(ValueError, match="'timm/alexnet' matches no model"):
        parts.models.chosen(["timm/resnet18", "timm/alexnet"])


def test_a_classifier_of_torchvision_is_built_the_same_each_time(parts: Any) -> None:
    pytest.importorskip("torchvision")
    one, other = (parts.models.built("torchvision/squeezenet1_1") for _ in range(2))
    image = one.inputs(torch.Generator().manual_seed(0), 2)
    assert one.heads[0] == "classifier.1"
    assert torch.equal(one.model(image), other.model(image))


def row_of(name: str, left: float, **more: Any) -> dict[str, Any]:
    """A row as a process gives it."""
    ours = {
        "equal": True, "difference": 1e-16, "precision": "float64", "cut": 1, "groups": 2, "latency": [2.0, 1.0], "seconds": 4.0,
        "peak": 90 * MIB, "double": 40 * MIB, "parameters_left": left, "core_left": left, "flops_left": left, "core_flops_left": left,
        "stays": [{"reason": "runs into a norm", "groups": 1, "share": 0.25, "first": "stem"}], **more,
    }  # fmt: skip
    return {"name": name, "ours": ours, "peer": {"seconds": 2.0, "parameters_left": 0.3, "runs": True}}


def test_medians_count_a_model_that_failed_as_whole(parts: Any) -> None:
    failed = {"name": "timm/c", "ours": {"failed": "TimeoutError: | it hangs"}, "peer": {"failed": "IndexError"}}
    rows = [row_of("timm/a", 0.25), row_of("timm/b", 0.5, equal=False, why="outputs differ"), failed]
    cells = parts.tables.summary(rows).splitlines()[2].split(" | ")
    assert cells[1:6] == ["3", "2", "1", "1", "0.500"]
    assert cells[9:] == ["2", "0.300", "2.0", "2.0", "2.2", "2.2 |"]
    above = parts.tables.above(rows)
    assert "timm/a" not in above
    assert "| timm/b | 0.500 | 0.30 | runs into a norm (1; 25.0%) |" in above
    assert "| timm/c | 1.000 | 0.30 | TimeoutError: \\| it hangs |" in above
    assert "| timm/b | outputs differ |" in parts.tables.failures(rows, "ours")
    assert "Of the 2 models" in parts.tables.both(rows)


def test_the_peak_of_small_models_is_not_a_ratio(parts: Any) -> None:
    assert parts.tables.memory_ratio(row_of("timm/a", 0.5)) == 90 / 40
    assert parts.tables.memory_ratio(row_of("timm/a", 0.5, double=MIB)) is None


def test_the_page_is_that_of_the_figures_beside_it(parts: Any, tmp_path: Path) -> None:
    rows = [
        row_of("timm/a", 0.50147),
        row_of("smp/b", 0.5, equal=False, difference=float("inf"), why="outputs differ"),
    ]
    parts.page.write(rows, "Written by a test.", tmp_path / "zoo.md")
    assert says_its_figures(parts, tmp_path / "zoo.md")
    text = (tmp_path / "zoo.md").read_text()
    assert "| smp/b | **no** | inf |" in text
    assert "Written by a test." in text
    assert "Infinity" not in (tmp_path / "zoo.json").read_text()  # is no JSON


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the zoo was not measured")
def test_the_published_page_is_that_of_its_figures(parts: Any) -> None:
    assert says_its_figures(parts, PUBLISHED)


def says_its_figures(parts: Any, page: Path) -> bool:
    """Whether a page holds what is written from the figures beside it."""
    figures = json.loads(page.with_suffix(".json").read_text())
    return page.read_text() == parts.page.text(figures["rows"], figures["source"])


def test_the_command_leaves_out_where_it_writes(parts: Any) -> None:
    assert "`python benchmarks/zoo.py --models timm/* --jobs 1` on " in parts.page.source(
        ["--models", "timm/*", "--out", "/somewhere/x.md", "--jobs", "1"]
    )
