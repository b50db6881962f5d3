"""A router that selects each request's plan and passes it on to an engine."""
