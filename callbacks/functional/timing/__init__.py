"""Rows of a timing and their figure."""
