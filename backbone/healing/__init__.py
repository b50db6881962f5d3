"""Small trained parts that take the place of skipped layers: fitted, trained, saved, attached to a model."""
