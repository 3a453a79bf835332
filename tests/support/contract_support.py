"""Old names of the rig, for the tests of channels until they import from its parts."""

from support.nets import Classifier, conv_net
from support.rig import differences, fit, structure

__all__ = ["Classifier", "conv_net", "differences", "fit", "structure"]
