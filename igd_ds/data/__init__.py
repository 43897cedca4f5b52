"""Data: sources → title hygiene → protocol → the canonical dataset folder → prompts and batches."""
