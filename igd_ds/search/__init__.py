"""Searches for a user's best catalogue items: beam and exact search, scores, item filters."""
