"""Loss landscape of a trained model: the loss under finite perturbations of the weights."""
