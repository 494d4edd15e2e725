"""Routers of other packages, recognized without an adapter."""
