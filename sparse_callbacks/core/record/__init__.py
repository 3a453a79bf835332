"""The record of a run: what the network was at each time, what it had cost by then, and the files that hold it."""
