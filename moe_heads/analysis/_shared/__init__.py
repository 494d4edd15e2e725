"""Modules that several analyses share: batches, saved state, processes and progress."""
