"""Models that predict the quality of plans, one file each."""
