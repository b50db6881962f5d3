"""Models that predict the losses of plans, one file each."""
