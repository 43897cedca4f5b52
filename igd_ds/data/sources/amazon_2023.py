"""Amazon reviews, release of 2023: reviews and metadata as JSON lines, or the ready-made benchmark CSVs in place of reviews.

    page      https://amazon-reviews-2023.github.io/ (files also at huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023)
    reviews   raw/review_categories/Musical_Instruments.jsonl(.gz): user_id, parent_asin, timestamp (milliseconds), … (1.5 GB)
    ratings   or benchmark/5core/rating_only/Musical_Instruments.csv(.gz), 0core too: user_id,parent_asin,rating,timestamp;
              or the three files of benchmark/*/last_out: NAME.train.csv, NAME.valid.csv, NAME.test.csv, read one after the other
    metadata  raw/meta_categories/meta_Musical_Instruments.jsonl(.gz): parent_asin, title, description, categories, store, price
    others    Industrial_and_Scientific: reviews 2 GB, metadata 1.2 GB

An item is a `parent_asin`; every review is an interaction; milliseconds decide the order within a second. The papers' numbers are
those of the 5-core ratings; `--protocol leave-one-out` on them gives the rows of the ready-made last_out files.
"""

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
INTERACTIONS = 'SELECT user_id AS "user", parent_asin AS item, "timestamp" AS "time", rowid AS position FROM reviews'
ITEMS = """SELECT parent_asin AS item, title, rowid AS position, array_to_string(description, ' ') AS description, categories,
    store AS brand, try_cast(price AS DOUBLE) AS price FROM metadata"""


def read(raw: RawReader, files: dict[str, list[Path]]) -> SourceData:
    """Read reviews or ratings and, where given, metadata. Raises ValueError when there are both or neither."""
    if ("reviews" in files) == ("ratings" in files):
        given = ", ".join(str(path) for paths in files.values() for path in paths)
        raise UsageError(
            f"source amazon-2023 needs either a file of reviews or CSVs of ratings, got {given}"
        )
    if "reviews" in files:
        raw.read_json_lines("reviews", files["reviews"], REVIEW_COLUMNS)
    else:
        raw.read_csv(
            "reviews", parts_in_order(files["ratings"], ".csv"), REVIEW_COLUMNS, delimiter=","
        )
    if "metadata" in files:
        raw.read_json_lines("metadata", files["metadata"], ITEM_COLUMNS)
    return raw.source_data(INTERACTIONS, ITEMS if "metadata" in files else None)
