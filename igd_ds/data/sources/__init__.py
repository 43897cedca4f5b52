"""Data sources, one file each. A source is a function (inputs, num_items, num_users, seed) → SourceData.

A new source is one file and one line of SOURCES. Sources that read files take their paths and use no other argument.
"""

from igd_ds.data.sources.sequences import read_sequences
from igd_ds.data.sources.synthetic import make_synthetic

SOURCES = {"sequences": read_sequences, "synthetic": make_synthetic}
