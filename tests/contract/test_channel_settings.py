"""Further settings of the channel methods under the contract, beside those of conf/method/."""

from dataclasses import replace
from typing import Any

import pytest

from sparse_callbacks import SMCP, ChannelPruning
from sparse_callbacks.testing import Settings, contract
from sparse_callbacks.testing.library import LIBRARY

pytestmark = pytest.mark.combinations


def changed(method: str, **arguments: object) -> Settings:
    """The library's settings of a method with other arguments."""
    settings = LIBRARY[method]
    return replace(settings, arguments={**settings.arguments, **arguments})


TestFilterNorms = contract(ChannelPruning, changed("ChannelPruning", criterion="l1", ranking="layer"))
TestNormGains: Any = contract(ChannelPruning, changed("ChannelPruning", criterion="bn_gain", ranking="global"))
# one case trains a network without batch norms, which this criterion refuses
del TestNormGains.test_micro_batches_equal_one_large_batch
TestWithoutHysteresis = contract(SMCP, changed("SMCP", hysteresis=1.0))
