"""A server before an engine: decides each request's plan with the allocator's first layers, and passes it on."""
