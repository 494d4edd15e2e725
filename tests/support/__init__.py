"""Helpers shared by the tests: references, models and shared assertions."""
