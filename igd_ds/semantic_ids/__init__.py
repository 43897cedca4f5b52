"""Semantic IDs: item embeddings, quantizers, collisions, and codes as tokens."""
