"""The table of docs/compatibility.md: what every method does with every feature, each cell from a run."""
