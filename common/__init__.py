"""Helpers that every script shares: flags, checkpoints, training, pictures, the text encoder."""
