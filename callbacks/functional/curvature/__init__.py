"""Curvature of a loss: the Hessian as an operator, and what Krylov methods read off it."""
