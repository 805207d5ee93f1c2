"""Losses, the jitted steps, checkpoints, metrics."""
