"""Source `amazon-2014`: Amazon reviews, release of 2014.

The reviews are JSON lines. The metadata are Python-dict lines (JSON in the "strict" files).

    page      https://jmcauley.ucsd.edu/data/amazon/links.html
    reviews   reviews_Books.json.gz (9 GB) or reviews_Books_5.json.gz (5-core, 3 GB):
              reviewerID, asin, helpful, unixReviewTime, …
    metadata  meta_Books.json.gz (0.8 GB): asin, title, description, categories, brand, price, …

The files are read as those of `amazon-2018`. Python-dict lines are parsed as literals, one by one,
at some 20,000 lines a second.
"""

from igd_ds.data.raw_files import FileKind
from igd_ds.data.sources.amazon_2018 import read

__all__ = ["FILES", "read"]

FILES = {
    "reviews": FileKind(frozenset({"reviewerID", "asin", "unixReviewTime", "helpful"})),
    "metadata": FileKind(frozenset({"asin", "categories"}), names=("meta_*.json",), optional=True),
}
