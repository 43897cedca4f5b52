"""Search for the best items of the catalogue: the tree cache, the beam search, the scoring rules, the logits processor."""
