"""Alignment of two networks of equal shapes by permutations that leave the network's function unchanged."""
