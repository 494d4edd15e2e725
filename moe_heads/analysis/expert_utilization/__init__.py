"""Expert utilization: the distribution of samples and classes over the experts of a router."""
