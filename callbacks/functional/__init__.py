"""The analyses as plain functions of a model, a loss and batches: no Lightning in here."""

from moe_heads.callbacks.functional.preserve import analysis_mode, preserved

__all__ = ["analysis_mode", "preserved"]
