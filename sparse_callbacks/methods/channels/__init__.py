"""Pruning of whole channels by published criteria, and what all methods under a budget share."""

# these register criteria, and what a checkpoint may hold
from sparse_callbacks.methods.channels import calibrated_criteria as calibrated_criteria
from sparse_callbacks.methods.channels import flow_criteria as flow_criteria
from sparse_callbacks.methods.channels import gate_criteria as gate_criteria
from sparse_callbacks.methods.channels import saved as saved
from sparse_callbacks.methods.channels import weight_criteria as weight_criteria
from sparse_callbacks.methods.channels.channel_pruning import ChannelPruning

__all__ = ["ChannelPruning"]
