"""The Lightning side of a classifier: module, backbones and data."""
