"""Commands of the command line: analyze a checkpoint, and compare analyzed checkpoints on one page."""
