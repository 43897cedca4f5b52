"""Semantic IDs: embeddings of items' texts, quantizers, collisions, and codes as tokens."""
