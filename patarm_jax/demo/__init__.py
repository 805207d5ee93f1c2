"""The embedded default: everything end to end, no downloads."""
