"""Loss landscape of a trained model: its loss under finite perturbations of the weights."""
