"""Sup-tickets: cycles at the end of training, and the merged weights of their networks."""

# register what others ask of it, and what a checkpoint of it may hold
from sparse_callbacks.methods.sup_tickets import registered as registered
from sparse_callbacks.methods.sup_tickets import saved as saved
from sparse_callbacks.methods.sup_tickets.sup_tickets import SupTickets

__all__ = ["SupTickets"]
