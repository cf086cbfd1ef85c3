"""rankleap: train RLVR, read the low-rank trajectory of the weights, leap ahead along it, and say whether to trust it."""
