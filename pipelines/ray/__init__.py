"""The same labels on a Ray cluster."""
