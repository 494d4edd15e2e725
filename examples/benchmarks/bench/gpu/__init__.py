"""Pieces of the evidence from a machine with a GPU."""
