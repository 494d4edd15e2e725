"""Expert utilization: how the samples and classes are spread over the experts of a router."""
