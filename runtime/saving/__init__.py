"""A saved allocator: its files, that they belong together, and how they change as a whole."""
