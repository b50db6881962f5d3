"""Token exits beside the allocator: the same prompts, judge, certificate and clock."""
