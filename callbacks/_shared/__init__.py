"""Modules that all callbacks share: the run of an analysis, its data, its options and its report."""

from moe_heads.callbacks._shared.lightning_version import warn_if_untested

warn_if_untested()
