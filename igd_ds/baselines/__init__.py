"""Sequential baselines: models that score items, their training sequences, item leaves."""
