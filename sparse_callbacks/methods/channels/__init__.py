"""Methods that prune whole channels under a budget: what they share."""

from sparse_callbacks.methods.channels import saved as saved  # registers what a checkpoint of them may hold
