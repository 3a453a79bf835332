"""Slimming: models that give nothing on noise, or other outputs each time."""

import pytest
import torch
from support.channel_nets import IMAGE, Residual, made, times_channels
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import RANDOM
from sparse_callbacks.channels.comparison_inputs import random_samples
from sparse_callbacks.channels.slim import slim, slimmable_groups
from sparse_callbacks.core.inspection import tensors_in

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


class Detector(nn.Module):
    """Gives the features of pixels that are brighter than 20, as boxes with their classes; the number of channels of
    ``first`` counts where ``counted``, which the trace does not see."""

    def __init__(self, counted: bool = False) -> None:
        super().__init__()
        self.counted = counted
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            x = self.first(image[None]).relu()
            if self.counted:
                x = times_channels(x)
            boxes = self.last(self.second(x).relu())[0][:, image.amin(0) > 20].T
            found.append({"boxes": boxes, "labels": boxes.argmax(1)})
        return found


def bright(least: float) -> tuple[list[Tensor]]:
    torch.manual_seed(0)
    return ([least + 10 * torch.rand(3, 6, 6)],)


MASKS = {"second.weight": torch.arange(8) < 4, "last.weight": torch.arange(6) < 3}


def test_a_detector_that_finds_nothing_in_noise_is_compared_near_the_example() -> None:
    net, example = Detector(), bright(21)
    samples = random_samples(net, example, 0).samples
    [image] = tensors_in(example)
    assert [len(net(*s)[0]["boxes"]) for s in samples[:2]] == [0, 0]
    noise = torch.stack([tensors_in(s)[0] - image for s in samples[2:]])
    assert noise.shape == (3, 3, 6, 6)
    assert 0.8 < float(noise.std() / image.std()) * 100 < 1.2
    small, proof = slim(net, MASKS, example)
    assert (small.first.out_channels, small.second.out_channels) == (4, 3)
    assert proof.removed == 7
    assert 0 <= proof.random.relative < 1e-5


def test_what_changes_the_boxes_near_the_example_is_put_back() -> None:
    example = bright(21)
    small, proof = slim(Detector(counted=True), MASKS, example)
    assert (small.first.out_channels, small.second.out_channels) == (8, 3)
    assert proof.left_out["first"].startswith("without them the outputs differ by")


def test_outputs_that_are_all_empty_prove_nothing() -> None:
    with pytest.raises(
        ValueError, match="All outputs of the masked model are empty, as of a detector that finds no box"
    ):
        slim(Detector(), MASKS, bright(1))


def test_boxes_on_given_inputs_alone_are_enough() -> None:
    _, proof = slim(Detector(counted=True), MASKS, bright(1), inputs=[bright(21)])
    assert set(proof.left_out) == {"first", "last"}
    assert proof.removed == 3


class Noisy(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


def test_a_model_that_is_random_in_eval_mode_is_named_as_such() -> None:
    net, x = made(Noisy), torch.randn(IMAGE)
    small, proof = slim(net, {"outer.weight": torch.arange(6) < 3}, x)
    assert small.inner.out_channels == 6
    assert proof.left_out["inner"] == RANDOM
    assert {g.reason for g in slimmable_groups(net, x)[:-1]} == {RANDOM}


def test_inputs_without_empty_outputs_are_two() -> None:
    assert len(random_samples(made(Residual), torch.randn(IMAGE), 0).samples) == 2
