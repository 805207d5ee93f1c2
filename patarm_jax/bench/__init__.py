"""How fast the pieces are, what limits them, and whether they became slower."""
