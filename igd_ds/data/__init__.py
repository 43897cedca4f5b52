"""The data room: sources, title hygiene, protocols, the dataset folder, prompts and batches."""
