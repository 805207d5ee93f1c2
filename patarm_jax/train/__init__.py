"""Losses, the optimizer and the jitted steps, as pure functions."""
