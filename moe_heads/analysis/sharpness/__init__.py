"""Sharpness of a trained model: its Hessian, and the rise of its loss under perturbations."""
