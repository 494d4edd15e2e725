"""Sharpness under perturbations that follow the scale of the weights: its parts."""
