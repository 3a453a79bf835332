"""One method over one model: masks, counters, selection. Knows torch and the standard library alone."""
