"""report → entries (train, eval, baseline, stats, show) → engine, recommender, validation, results → weighting, data, models,
decoding → items, loss, metrics → config, distributed, runlog.

Imports flow only along this arrow, and packages of one group do not import each other (`tests/unit/test_structure.py`).

Items are token paths in one trie; the trie says how decisive each token is; that number weights the loss while DeepSpeed
trains (`train.py`) and the scores while the evaluator searches (`eval.py`).
"""

__version__ = "0.1.0"
