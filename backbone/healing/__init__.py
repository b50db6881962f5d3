"""Small trained parts that take the place of skipped layers: fitted, trained, saved, made ready for a model."""
