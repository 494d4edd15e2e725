"""Parts that several analyses need: batches, saved state, processes and progress."""
