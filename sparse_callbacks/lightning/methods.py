"""Every method as a callback: what a Trainer takes."""

from sparse_callbacks import methods
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.lightning.turns import TurnTaking

# The method comes first, so that help() and inspect.signature() show what it does and takes.


class CTRE(methods.CTRE, SparsityCallback):
    __doc__ = methods.CTRE.__doc__


class DPF(methods.DPF, SparsityCallback):
    __doc__ = methods.DPF.__doc__


class GMP(methods.GMP, SparsityCallback):
    __doc__ = methods.GMP.__doc__


class NM(methods.NM, SparsityCallback):
    __doc__ = methods.NM.__doc__


class SET(methods.SET, SparsityCallback):
    __doc__ = methods.SET.__doc__


class SMCP(methods.SMCP, SparsityCallback):
    __doc__ = methods.SMCP.__doc__


class SNFS(methods.SNFS, SparsityCallback):
    __doc__ = methods.SNFS.__doc__


class ChannelPruning(methods.ChannelPruning, SparsityCallback):
    __doc__ = methods.ChannelPruning.__doc__


class ConstrainedL0(methods.ConstrainedL0, SparsityCallback):
    __doc__ = methods.ConstrainedL0.__doc__


class EarlyCroP(methods.EarlyCroP, SparsityCallback):
    __doc__ = methods.EarlyCroP.__doc__


class GaP(methods.GaP, SparsityCallback):
    __doc__ = methods.GaP.__doc__


class PruneAtStart(methods.PruneAtStart, SparsityCallback):
    __doc__ = methods.PruneAtStart.__doc__


class RigL(methods.RigL, SparsityCallback):
    __doc__ = methods.RigL.__doc__


class Static(methods.Static, SparsityCallback):
    __doc__ = methods.Static.__doc__


class SupTickets(methods.SupTickets, SparsityCallback):
    __doc__ = methods.SupTickets.__doc__


class ParallelGaP(methods.ParallelGaP, TurnTaking):
    __doc__ = methods.ParallelGaP.__doc__
