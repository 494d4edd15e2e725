"""Sums over routed rows, and what they say about the experts."""
