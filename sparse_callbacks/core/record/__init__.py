"""The record of a run: what the network was at each time, and what it had cost by then."""
