"""Running statistics of batch norms, estimated anew."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import recalibrate_batchnorm
from sparse_callbacks.testing.comparison import differences


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=0.3, eps=0.1)
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 4) + n, torch.zeros(n)) for n in (5, 8, 3)]


def test_statistics_are_the_mean_over_batches() -> None:
    module = net().double()
    data = [x.double() for x, _ in batches()]
    recalibrate_batchnorm(module, data)
    first, second = module[1], module[4]
    inputs = [module[0](x).detach() for x in data]
    assert torch.allclose(first.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), rtol=1e-12)
    assert torch.allclose(first.running_var, torch.stack([x.var(0) for x in inputs]).mean(0), rtol=1e-12)
    # the second norm sees the first one normalise by its batch, and no dropout
    weight, bias = first.weight, first.bias
    normed = [(x - x.mean(0)) / (x.var(0, unbiased=False) + first.eps).sqrt() * weight + bias for x in inputs]
    inputs = [module[3](x).detach() for x in normed]
    assert torch.allclose(second.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0), rtol=1e-9)
    assert torch.allclose(second.running_var, torch.stack([x.var(0) for x in inputs]).mean(0), rtol=1e-9)
    assert (int(first.num_batches_tracked), second.momentum) == (3, 0.3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_else_stays(training: bool) -> None:
    module = net().train(training)
    module[4].eval()  # frozen in training: its modes stay, its statistics are new all the same
    modes = [m.training for m in module.modules()]
    parameters = {n: p.detach().clone() for n, p in module.named_parameters()}
    before = copy.deepcopy(module[4].state_dict())
    data, random = batches(), torch.get_rng_state()
    recalibrate_batchnorm(module, data)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert differences(parameters, {n: p.detach() for n, p in module.named_parameters()}) == []
    assert all(p.grad is None for p in module.parameters())
    assert not torch.equal(module[4].running_mean, before["running_mean"])
    assert not module[4].running_mean.requires_grad


def test_a_function_may_run_the_network() -> None:
    one, other = net(), net()
    recalibrate_batchnorm(one, batches())
    recalibrate_batchnorm(other, [{"images": x} for x, _ in batches()], forward=lambda module, b: module(b["images"]))
    assert differences(dict(one.state_dict()), dict(other.state_dict())) == []


@pytest.mark.parametrize("forward", [None, lambda module, batch: module(batch)], ids=["called", "by a function"])
def test_batches_of_one_sample_have_no_variance_and_are_left_out(forward: Any) -> None:
    one, other, data = net(), net(), [x for x, _ in batches()]
    recalibrate_batchnorm(one, data)
    with pytest.warns(UserWarning, match=r"batches of one sample were left out of the statistics.* \(2 of them\)"):
        recalibrate_batchnorm(other, [data[0], torch.ones(1, 4), *data[1:], torch.ones(1, 4)], forward=forward)
    assert differences(dict(one.state_dict()), dict(other.state_dict())) == []
    # images of more than one pixel have a variance
    image = nn.BatchNorm2d(1)
    recalibrate_batchnorm(image, [torch.arange(4.0).view(1, 1, 2, 2)])
    assert float(image.running_mean) == 1.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], r"batches=.* holds no batch of two samples or more, so nothing is known of the statistics"),
        (torch.zeros(3, 4), r"is not a collection of batches. Give a loader, or a list: \[batch\]"),
        ([torch.zeros(2, 4), torch.zeros(2, 5)], "forward failed on a batch"),
        ([torch.zeros(1, 4)], r"batches=.* holds no batch of two samples or more"),
    ],
    ids=["none", "a tensor", "one of another shape", "one sample"],
)
def test_what_is_refused_leaves_the_norms_as_they_were(data: object, words: str) -> None:
    module = net()
    module(torch.randn(7, 4))
    before = copy.deepcopy(dict(module.state_dict()))
    with pytest.raises(ValueError, match=words):
        recalibrate_batchnorm(module, data)  # type: ignore[arg-type]
    assert differences(before, dict(module.state_dict())) == []
    assert module[1].momentum == 0.1


def test_a_module_without_such_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no batch norm with running statistics"):
        recalibrate_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), [torch.zeros(2, 2)])
