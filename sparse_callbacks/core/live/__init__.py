"""Exchanged layers in a run: their places, updates, records and state."""
