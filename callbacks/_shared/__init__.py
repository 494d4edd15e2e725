"""Modules that all callbacks share: the run of an analysis, its data, its options and its report."""
