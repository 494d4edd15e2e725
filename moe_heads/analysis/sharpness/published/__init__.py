"""PyHessian as arXiv 2601.15021 used it: its parts."""
