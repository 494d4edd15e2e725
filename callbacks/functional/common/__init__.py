"""What every analysis stands on: batches and memory, processes and progress, and a model that is left as it was."""
