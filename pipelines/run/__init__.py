"""A run: its folder, its stages in order, what is done and what is left."""
