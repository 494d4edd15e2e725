"""Sharpness of a trained model: spectrum, trace and density of the Hessian, and the rise of the loss under perturbations."""
