"""Directions in parameter space, and what a walk along them found."""
