"""Inference timing: latency, throughput, and the gap between theoretical and realized speed."""
