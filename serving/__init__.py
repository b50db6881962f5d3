"""Many users: a router with the OpenAI routes. Plans inside vLLM are a distribution of their own (`serving/vllm`)."""
