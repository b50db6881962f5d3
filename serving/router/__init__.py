"""A router before an engine: selects each request's plan with the allocator's first layers, and passes it on."""
