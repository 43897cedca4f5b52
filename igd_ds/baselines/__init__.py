"""Sequential baselines: models that score items, their training sequences, and items as columns of scores."""
