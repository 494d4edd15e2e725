"""Critical sharpness: the step along an optimizer's update at which the loss rises, from forward passes alone."""
