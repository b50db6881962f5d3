"""Layer plans inside vLLM: each request may name the decoder layers that it runs."""
