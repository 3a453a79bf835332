"""The methods: one file each, or one folder where a method needs modules of its own."""

from sparse_callbacks.methods.channels import ChannelPruning
from sparse_callbacks.methods.ctre import CTRE
from sparse_callbacks.methods.dpf import DPF
from sparse_callbacks.methods.gap import GaP, ParallelGaP
from sparse_callbacks.methods.gmp import GMP
from sparse_callbacks.methods.l0 import ConstrainedL0
from sparse_callbacks.methods.nm import NM
from sparse_callbacks.methods.prune_at_start import EarlyCroP, PruneAtStart
from sparse_callbacks.methods.rigl import RigL
from sparse_callbacks.methods.set import SET
from sparse_callbacks.methods.smcp import SMCP
from sparse_callbacks.methods.snfs import SNFS
from sparse_callbacks.methods.static import Static
from sparse_callbacks.methods.sup_tickets import SupTickets

__all__ = [
    "CTRE",
    "DPF",
    "GMP",
    "NM",
    "SET",
    "SMCP",
    "SNFS",
    "ChannelPruning",
    "ConstrainedL0",
    "EarlyCroP",
    "GaP",
    "ParallelGaP",
    "PruneAtStart",
    "RigL",
    "Static",
    "SupTickets",
]
