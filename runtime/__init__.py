"""Use a trained allocation inside `generate()`."""
