"""Channel groups: what shares a channel, what has to stay and why, and a model that is left as it was."""

import copy

import pytest
import support.channel_nets as nets
import torch
from support.channel_nets import IMAGE, OUTPUTS, made
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.obstacles import NEVER_CALLED
from sparse_callbacks.channels.slim import slim, slimmable_groups
from sparse_callbacks.testing.comparison import differences, structure


def groups_of(net: nn.Module, shape: tuple[int, ...] = IMAGE, **options: object) -> dict[str, Group]:
    return {g.name: g for g in channel_groups(net, torch.zeros(shape), **options)}


def parts(group: Group) -> tuple[list[str], list[str], list[str]]:
    """Parameters of producers, consumers and followers."""
    return tuple(sorted(m.parameter for m in side) for side in (group.producers, group.consumers, group.followers))


def test_a_residual_sum_makes_one_group() -> None:
    found = groups_of(made(nets.Residual))
    assert {n: (g.size, g.reason) for n, g in found.items()} == {
        "stem": (8, ""),
        "inner": (6, ""),
        "head": (5, OUTPUTS),
    }
    assert parts(found["stem"]) == (["outer.weight", "stem.weight"], ["head.weight", "inner.weight"], ["norm.weight"])
    assert parts(found["inner"]) == (["inner.weight"], ["outer.weight"], [])
    assert all(m.units.tolist() == list(range(8)) for m in found["stem"].members)


def test_channels_move_through_a_padding_and_what_it_adds_has_to_stay() -> None:
    found = groups_of(made(nets.Padded))
    assert {n: (g.size, g.reason) for n, g in found.items()} == {
        "stem": (6, ""),
        "inner": (4, ""),
        "outer": (3, "meets a padding of channels, whose width the model fixes"),
        "head.2": (5, OUTPUTS),
    }
    stem = found["stem"]
    assert parts(stem) == (["outer.weight", "stem.weight"], ["head.2.weight", "inner.weight"], ["norm.weight"])
    units = {m.parameter: m.units.tolist() for m in stem.members}
    assert units["outer.weight"] == [-1, -1, 0, 1, 2, 3, 4, 5, -1]
    assert units["head.2.weight"] == [u for u in units["outer.weight"] for _ in range(4)]
    assert units["stem.weight"] == units["inner.weight"] == units["norm.weight"] == [0, 1, 2, 3, 4, 5]
    assert groups_of(made(nets.Cropped))["first"].reason == "runs into a crop of channels"


def test_a_concatenation_gives_offsets() -> None:
    found = groups_of(made(nets.Concat))
    (head,), (norm,) = found["b"].consumers, found["b"].followers
    assert (head.parameter, head.dim) == ("head.weight", 1)
    assert head.units.tolist() == norm.units.tolist() == [-1] * 4 + [0, 1, 2, 3, 4, 5]
    assert found["a"].consumers[0].units.tolist() == [0, 1, 2, 3] + [-1] * 6
    keep = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    assert found["b"].masks(made(nets.Concat), keep)["head.weight"].shape == (1, 10, 1, 1)
    assert head.kept(keep).int().tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 0, 1]


def test_squeeze_excite_reads_and_scales_the_channels_of_a_depthwise_convolution() -> None:
    found = groups_of(made(nets.SqueezeExcite))
    assert parts(found["expand.0"]) == (
        ["expand.0.weight", "up.weight"],
        ["down.weight", "project.weight"],
        ["depthwise.0.weight", "depthwise.1.weight", "expand.1.weight"],
    )
    assert parts(found["down"]) == (["down.weight"], ["up.weight"], [])


def test_flattening_gives_every_channel_several_inputs() -> None:
    found = groups_of(made(nets.flattened))
    assert found["0"].consumers[0].units.tolist() == [c for c in range(6) for _ in range(4)]
    mask = found["0"].masks(made(nets.flattened), torch.arange(6) > 1)["4.weight"]
    assert mask.shape == (1, 24)
    assert mask[0].int().tolist() == [0] * 8 + [1] * 16


def test_a_grouped_convolution_ties_the_channels_with_the_same_place_in_its_groups() -> None:
    found = groups_of(made(nets.grouped))
    first, second = found["0"], found["3"]
    assert first.size == 6
    assert first.producers[0].units.tolist() == first.followers[0].units.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert first.consumers[0].units.tolist() == [0, 1, 2, 3, 4, 5]  # the weight is [8, 6, 3, 3]
    assert second.size == 4
    assert second.producers[0].units.tolist() == second.consumers[0].units.tolist() == [0, 1, 2, 3] * 2


def test_a_grouped_convolution_ties_the_branches_of_a_concatenation() -> None:
    found = groups_of(made(nets.Joined))
    assert {n: (g.size, g.reason) for n, g in found.items()} == {
        "a": (2, ""),
        "b": (4, ""),
        "groups": (3, ""),
        "head": (4, OUTPUTS),
    }
    assert {
        m.parameter: m.units.tolist() for m in found["a"].members
    } == {  # channels 0, 1 of the concatenation, and 6, 7
        "a.weight": [0, 1],
        "c.weight": [0, 1] + [-1] * 4,
        "norm.weight": [0, 1, -1, -1, -1, -1] * 2,
        "groups.weight": [0, 1] + [-1] * 4,
    }
    assert [p.units.tolist() for p in found["b"].producers if p.module == "c"] == [[-1, -1, 0, 1, 2, 3]]


def test_what_runs_in_train_mode_only_is_followed() -> None:
    net = made(nets.Auxiliary).train()
    found = groups_of(net)
    assert parts(found["first"]) == (["first.weight"], ["aside.conv.weight", "second.weight"], ["norm.weight"])
    assert parts(found["aside.conv"]) == (["aside.conv.weight"], ["aside.head.weight"], [])
    assert {n for n, g in found.items() if g.reason == OUTPUTS} == {"head", "aside.head"}
    assert all(m.training for m in net.modules())
    assert groups_of(made(nets.Auxiliary), exclude="aside.conv")["first"].reason == "aside.conv is excluded"


class Picky(nets.Auxiliary):
    """In train mode it takes no small images, as an auxiliary head behind a large kernel."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and x.shape[-1] < 9:
            raise RuntimeError("too small")
        return super().forward(x)


def test_branches_that_fail_in_train_mode_stay_unknown() -> None:
    assert groups_of(made(Picky), (1, 3, 8, 8))["aside.conv"].reason.startswith("not found in the trace")
    assert not groups_of(made(Picky), (1, 3, 9, 9))["aside.conv"].reason


def test_transposed_convolutions_store_their_inputs_first() -> None:
    found = groups_of(made(nets.transposed))
    assert [(c.dim, c.units.tolist()) for c in found["0"].consumers] == [(0, [0, 1, 2, 3] * 2)]
    assert [(p.dim, p.units.tolist()) for p in found["2"].producers] == [(1, [0, 1, 2, 3, 4, 5])]
    assert [(c.dim, c.units.tolist()) for c in found["2"].consumers] == [(0, [0, 1, 2, 3, 4, 5] * 2)]


def test_parameters_with_an_entry_for_each_channel_follow_and_shared_ones_do_not() -> None:
    assert parts(groups_of(made(nets.Scaled))["first"]) == (
        ["first.weight"],
        ["last.weight"],
        ["scale", "slopes.weight"],
    )


def test_reused_layers_and_layers_of_another_class_are_fine() -> None:
    found = groups_of(made(nets.Reused))
    assert parts(found["first"]) == (["first.weight", "twice.weight"], ["head.weight", "twice.weight"], [])
    assert [
        g.reason for g in channel_groups(nn.Sequential(nets.Kernel(3, 4, 1), nets.Kernel(4, 2, 1)), torch.zeros(IMAGE))
    ] == [
        "",
        OUTPUTS,
    ]


def test_the_halves_of_a_chunk_that_meet_are_one_unit() -> None:
    found = groups_of(made(nets.Chunked))
    assert found["both"].size == 8
    assert found["both"].producers[0].units.tolist() == list(range(8)) * 2


def test_the_parts_of_a_chunk_stay_equally_large() -> None:
    found = groups_of(made(nets.Split))
    assert found["both"].size == 8
    assert {m.parameter: m.units.tolist() for m in found["both"].members} == {
        "both.weight": list(range(8)) * 2,
        "branch.weight": list(range(8)),
        "head.weight": list(range(8)) + [-1] * 6,
    }


def test_the_units_of_a_transformers_mlp_are_channels() -> None:
    found = groups_of(made(nets.Transformer), (2, 4, 6))
    assert {n for n, g in found.items() if not g.reason} == {"up"}
    assert found["attention.in_proj_weight"].reason.startswith("nn.MultiheadAttention divides its width")
    assert parts(found["up"]) == (["up.weight"], ["down.weight"], [])
    residual = found["attention.out_proj"]
    assert residual.reason == "shares channels with the network's input"
    assert [p.parameter for p in residual.producers] == ["attention.out_proj.weight", "down.weight"]


def test_rotary_attention_gives_heads_and_units_of_the_mlp() -> None:
    """The halves of a head are exchanged and added to it, so that the axis meets itself."""
    found = groups_of(made(nets.Rotary), (1, 6, 16))
    assert {n: (g.size, g.reason) for n, g in found.items()} == {
        "q": (2, ""),
        "o": (16, "shares channels with the network's input"),
        "up": (32, ""),
        "head": (5, OUTPUTS),
    }
    heads = found["q"]
    assert parts(heads) == (["k.weight", "q.weight", "v.weight"], ["o.weight"], [])
    assert all(m.units.tolist() == [0] * 8 + [1] * 8 for m in heads.members)
    assert groups_of(made(nets.Rotary), (1, 6, 16), exclude=["q", "k"])["q"].reason == "q is excluded"


def test_a_key_that_serves_several_queries_is_one_unit_with_them() -> None:
    found = groups_of(made(lambda: nets.GroupedQueries(heads=4, shared=2)), (1, 5, 12))
    heads = found["q"]
    assert (heads.size, heads.reason) == (2, "")
    units = {m.parameter: m.units.tolist() for m in heads.members}
    assert units["q.weight"] == units["o.weight"] == [0] * 6 + [1] * 6
    assert units["k.weight"] == units["v.weight"] == [0] * 3 + [1] * 3


class SharedKeys(nets.GroupedQueries):
    """The same without repeating keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.head(self.o(mixed.transpose(1, 2).flatten(2)).relu())


def test_queries_that_share_a_key_go_with_it_alone() -> None:
    found = groups_of(made(lambda: SharedKeys(heads=4, shared=2)), (1, 5, 12))
    assert [(n, g.size) for n, g in found.items() if not g.reason] == [("q", 2), ("o", 12)]
    assert found["q"].producers[0].units.tolist() == [0] * 6 + [1] * 6


@pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
def test_queries_that_all_share_one_key_go_singly() -> None:
    net = made(lambda: SharedKeys(heads=4, shared=1))
    found = groups_of(net, (1, 5, 12))
    assert [(n, g.size) for n, g in found.items() if not g.reason] == [("q", 4), ("o", 12)]
    assert parts(found["q"]) == (["q.weight"], ["o.weight"], [])
    small, proof = slim(net, {"o.weight": torch.arange(12) // 3 != 1}, torch.randn(1, 5, 12))
    assert (small.q.out_features, small.k.out_features, proof.removed) == (9, 3, 3)


def test_a_depthwise_convolution_with_several_outputs_of_an_input_loses_groups_and_outputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 18, 3, groups=6), nn.BatchNorm2d(18), nn.Conv2d(18, 2, 1)
    ).eval()
    found = groups_of(net)
    assert {n: (g.size, g.reason) for n, g in found.items()} == {"0": (6, ""), "1": (3, ""), "3": (2, OUTPUTS)}
    assert parts(found["0"]) == (["0.weight"], ["3.weight"], ["1.weight", "2.weight"])
    assert found["1"].producers[0].units.tolist() == [0, 1, 2] * 6
    for inputs, outputs in [((1, 4), ()), ((), (2,)), ((1, 4), (2,))]:
        keep = torch.tensor([i not in inputs and o not in outputs for i in range(6) for o in range(3)])
        masked = copy.deepcopy(net)
        masked[3].weight.data *= keep.view(1, -1, 1, 1)
        small, _ = slim(masked, {"3.weight": keep}, torch.randn(2, 3, 8, 8))
        left = (6 - len(inputs), 6 - len(inputs), (6 - len(inputs)) * (3 - len(outputs)))
        assert (small[1].groups, small[1].in_channels, small[1].out_channels) == left
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(small(x), masked(x))


class SkippedDepthwise(nn.Module):
    """A layer with a skip connection around it alone, on channels that are a product of two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4)
        self.around, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        return self.last((x + self.around(x)).relu())


def test_a_skip_connection_around_one_layer_keeps_its_two_sides_apart() -> None:
    found = groups_of(made(SkippedDepthwise))
    assert {n: (g.size, g.reason) for n, g in found.items() if n != "last"} == {"first": (4, ""), "twice": (2, "")}
    sides = {(m.parameter, m.dim): m.side for m in found["first"].members}
    assert (sides["around.weight", 0], sides["around.weight", 1]) == ("out", "in")


def test_vectors_that_no_checkpoint_holds_stay() -> None:
    net = made(nets.Frozen)
    net.norm.register_buffer("mean", net.norm.mean, persistent=False)
    assert groups_of(net)["first"].reason == "norm.mean is a buffer that no checkpoint holds (persistent=False)"


def test_vectors_in_buffers_follow() -> None:
    found = groups_of(made(nets.Frozen))
    assert parts(found["first"]) == (
        ["first.weight"],
        ["last.weight"],
        ["norm.bias", "norm.mean", "norm.scale"],
    )


# ---------------------------------------------------------------------- what has to stay


class Lonely(nn.Module):
    """Layers around an operation of the user's."""

    def __init__(self, operation: object) -> None:
        super().__init__()
        self.first, self.operation, self.last = nn.Conv2d(3, 4, 1), operation, nn.Conv2d(4, 2, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x)))


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (nn.GroupNorm(2, 4), "runs into operation (GroupNorm), of which no single channels can be removed"),
        (nn.Softmax(1), "runs into _softmax in operation (Softmax), which mixes these channels"),
        (nn.ConvTranspose2d(4, 8, 1, groups=4), "operation: its groups must stay as many as they are"),
        (nn.LayerNorm([4, 8, 8]), "runs into operation (LayerNorm), of which no single channels can be removed"),
    ],
    ids=str,
)
def test_what_ties_channels_is_named(operation: object, reason: str) -> None:
    net = Lonely(operation)
    if isinstance(operation, nn.ConvTranspose2d):
        net.last = nn.Conv2d(operation.out_channels, 2, 1)
    found = groups_of(net)
    assert found["first"].reason == reason
    assert found["unused"].reason == NEVER_CALLED


def test_channels_that_no_layer_reads_stay() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.side, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) * self.side(x).mean(1, keepdim=True)

    assert groups_of(Side())["side"].reason == "runs into mean, which mixes these channels"


class FromInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.first(x))


def test_the_input_of_the_network_is_never_cut() -> None:
    assert groups_of(FromInput())["first"].reason == "shares channels with the network's input"


def test_frozen_layers_and_parameters_are_seen() -> None:
    net = made(nets.Scaled).requires_grad_(False)
    assert parts(groups_of(net)["first"]) == (["first.weight"], ["last.weight"], ["scale", "slopes.weight"])
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("exclude", ["inner", "inner.weight", ["inn*"]])
def test_excluded_layers_keep_their_inputs_and_outputs(exclude: object) -> None:
    found = groups_of(made(nets.Residual), exclude=exclude)
    assert found["stem"].reason == found["inner"].reason == "inner is excluded"


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"exclude='foo\*' matches no module and no parameter. There are for example stem"
    ):
        groups_of(made(nets.Residual), exclude="foo*")


def test_tied_and_computed_weights_stay() -> None:
    tied = made(nets.Reused)
    tied.head = nn.Conv2d(8, 8, 1)
    tied.head.weight = tied.twice.weight
    assert groups_of(tied)["first"].reason == "head.weight and twice.weight are one parameter"
    computed = made(nets.Residual)
    nn.utils.parametrizations.weight_norm(computed.inner)
    assert {g.reason for g in channel_groups(computed, torch.zeros(IMAGE)) if "parametrized" in g.reason}


# ---------------------------------------------------------------------- how it looks


def test_the_model_is_left_as_it_was() -> None:
    net = made(nets.Residual)
    net.train()
    net.inner.eval()
    net.stem.weight.requires_grad = False
    before, values, random = structure(net), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    with torch.no_grad():
        assert not groups_of(net)["stem"].reason
    assert differences(before, structure(net)) == []
    assert differences(values, net.state_dict()) == []
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="Residual cannot be traced"):
        channel_groups(net, torch.zeros(2, 5, 8, 8))
    assert [m.training for m in net.modules()] == modes
    assert not net.stem.weight.requires_grad


class Stored(nn.Module):
    """It keeps a tensor of every pass, and counts them in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.middle = self.first(x).relu()
        return self.last(self.middle)


def test_what_a_pass_writes_is_written_to_a_copy() -> None:
    net = Stored()
    assert not groups_of(net, (2, 4))["first"].reason
    assert net.passes == 0
    assert not hasattr(net, "middle")
    copy.deepcopy(net)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_failed_search_leaves_no_hooks(seconds: float) -> None:
    net = made(nets.Residual)
    with pytest.raises((ValueError, TimeoutError)):
        channel_groups(net, torch.zeros(2, 5, 8, 8), seconds=seconds)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    torch.nn.utils.prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def stored() -> nn.Module:
    net = Stored()
    net(torch.zeros(2, 4))
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            pruned,
            r"Sequential cannot be copied \(RuntimeError: .*0.weight_orig is of torch.nn.utils.prune or weight_norm: call prune.r",
        ),
        (
            stored,
            r"Stored cannot be copied \(RuntimeError: .*Detach, or delete, the tensors that its forward pass or its hooks store",
        ),
        (
            lambda: torch.jit.script(nn.Linear(4, 2)),
            "This is a ScriptModule, made by torch.jit.script or torch.jit.trace, whose layers cannot be replaced.",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_that_cannot_be_copied_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        groups_of(build(), (2, 4))


def test_inference_mode_is_left_alone() -> None:
    net = made(nets.Residual)
    with torch.inference_mode():
        assert not groups_of(net)["stem"].reason
        assert torch.is_inference_mode_enabled()
    assert not net.stem.weight.is_inference()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"y": self.last(self.first(x) * scale)}


@pytest.mark.parametrize(
    "given", [(torch.zeros(1, 4), torch.ones(1)), {"scale": torch.ones(1), "x": torch.zeros(1, 4)}], ids=type
)
def test_inputs_may_be_several_and_outputs_a_dictionary(given: object) -> None:
    first, last = channel_groups(Named(), given)
    assert (first.name, last.reason) == ("first", OUTPUTS)


@pytest.mark.parametrize("search", [channel_groups, slimmable_groups])
def test_a_limit_that_leaves_no_time_is_refused(search: object) -> None:
    net = made(nets.Residual)
    with pytest.raises(ValueError, match=r"seconds=0.0 leaves no time for the search"):
        search(net, torch.zeros(IMAGE), seconds=0.0)
    with pytest.raises(TypeError, match=r"seconds='x' is not of a type"):
        search(net, torch.zeros(IMAGE), seconds="x")


def test_a_search_that_takes_too_long_is_given_up() -> None:
    net = made(nets.Residual)
    with pytest.raises(TimeoutError, match=r"took more than \S+ s. Give a smaller example_input, a longer seconds="):
        groups_of(net, seconds=1e-9)
    assert all(p.requires_grad for p in net.parameters())
