"""A Hugging Face decoder that can run any layer plan."""
