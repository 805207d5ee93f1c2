"""How good a judge is, in numbers."""
