"""Shared by every script: flags, checkpoints, the training loop's parts, pictures, the text encoder."""
