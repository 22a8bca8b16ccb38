"""The training loop and everything a run leaves on disk."""
