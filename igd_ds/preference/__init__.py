"""Preference training: what `igd prefer` begins with, its pairs of items, and what it trains."""
