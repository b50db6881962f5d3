"""Reports on policies: quality and budget, headroom, gain over rivals."""
