"""Source `amazon-2023`: Amazon reviews, release of 2023.

Reviews and metadata are JSON lines. The ready-made benchmark CSVs can replace the reviews.

    page      https://amazon-reviews-2023.github.io/
              (files also at huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023)
    reviews   raw/review_categories/Musical_Instruments.jsonl(.gz) (1.5 GB):
              user_id, parent_asin, timestamp (milliseconds), …
    ratings   or benchmark/5core/rating_only/Musical_Instruments.csv(.gz), 0core too:
              user_id,parent_asin,rating,timestamp
              or the three files of benchmark/*/last_out, which are read one after the other:
              NAME.train.csv, NAME.valid.csv, NAME.test.csv
    metadata  raw/meta_categories/meta_Musical_Instruments.jsonl(.gz):
              parent_asin, title, description, categories, store, price
    others    Industrial_and_Scientific: reviews 2 GB, metadata 1.2 GB

An item is a `parent_asin`, and every review is an interaction. Milliseconds decide the order within
a second. The numbers in the papers are those of the 5-core ratings; `--protocol leave-one-out` on
them gives the rows of the ready-made last_out files.
"""

from collections.abc import Mapping
from pathlib import Path

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, parts_in_order
from igd_ds.errors import UsageError

REVIEW_KEYS = frozenset({"user_id", "parent_asin", "timestamp"})
FILES = {
    "reviews": FileKind(REVIEW_KEYS, optional=True),
    "ratings": FileKind(REVIEW_KEYS, header=True, optional=True, many=True),
    "metadata": FileKind(
        frozenset({"parent_asin", "title", "main_category"}), names=("meta_*.jsonl",), optional=True
    ),
}
REVIEW_COLUMNS = {"user_id": "VARCHAR", "parent_asin": "VARCHAR", "timestamp": "BIGINT"}
ITEM_COLUMNS = {
    "parent_asin": "VARCHAR",
    "title": "VARCHAR",
    "description": "VARCHAR[]",
    "categories": "VARCHAR[]",
    "store": "VARCHAR",
    "price": "VARCHAR",  # a number, null, or a text like "from 12.99"
}
INTERACTIONS = """
    SELECT user_id AS "user", parent_asin AS item, "timestamp" AS "time", rowid AS position
    FROM reviews"""
ITEMS = """
    SELECT parent_asin AS item, title, rowid AS position,
        array_to_string(description, ' ') AS description, categories, store AS brand,
        try_cast(price AS DOUBLE) AS price
    FROM metadata"""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read reviews or ratings and, if given, metadata.

    Raises:
        UsageError: there are both reviews and ratings, or neither.
    """
    if ("reviews" in files) == ("ratings" in files):
        given = ", ".join(str(path) for paths in files.values() for path in paths)
        raise UsageError(
            f"source amazon-2023 needs either a file of reviews or CSVs of ratings, got {given}"
        )
    if "reviews" in files:
        raw.read_json_lines("reviews", files["reviews"], REVIEW_COLUMNS)
    else:
        ratings = parts_in_order(files["ratings"], ".csv")
        raw.read_csv("reviews", ratings, REVIEW_COLUMNS, delimiter=",")

    if "metadata" in files:
        raw.read_json_lines("metadata", files["metadata"], ITEM_COLUMNS)
    return raw.source_data(INTERACTIONS, ITEMS if "metadata" in files else None)
