"""The stories: one training or judging run per file, read top to bottom."""
