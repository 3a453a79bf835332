"""The doctor: warnings of a run that is likely to go wrong, each given once and with its remedy."""
