"""What labels say about the best that can be had: static mixtures, the oracle, and how sure that is."""
