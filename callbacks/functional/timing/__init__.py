"""The parts of an inference timing: calls, modes, rounds, statistics, and the result."""
