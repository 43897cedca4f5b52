"""Source `amazon-2018`: Amazon reviews, release of 2018.

Reviews and metadata of one category, as JSON lines (.json or .json.gz).

    page      https://nijianmo.github.io/amazon/
              (also cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2)
    reviews   Books.json.gz (all, 12 GB) or Books_5.json.gz (5-core, 7 GB):
              reviewerID, asin, unixReviewTime, …
    metadata  meta_Books.json.gz (1.2 GB): asin, title, description, category, brand, price, …
    others    CDs_and_Vinyl 2 GB, Video_Games 0.6 GB, Toys_and_Games 1.5 GB,
              Sports_and_Outdoors 2.2 GB, each with its metadata

Every review is an interaction, whatever its rating. The 5-core files give the same datasets as the
full files, because the core is computed again inside the time window. Times are whole days;
interactions of one day are ordered by their position in the file.
"""

from collections.abc import Mapping
from pathlib import Path

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind

FILES = {
    "reviews": FileKind(frozenset({"reviewerID", "asin", "unixReviewTime", "verified"})),
    "metadata": FileKind(
        frozenset({"asin", "title", "category"}), names=("meta_*.json",), optional=True
    ),
}
REVIEW_COLUMNS = {"reviewerID": "VARCHAR", "asin": "VARCHAR", "unixReviewTime": "BIGINT"}
ITEM_COLUMNS = {
    "asin": "VARCHAR",
    "title": "VARCHAR",
    "description": "JSON",  # a text in 2014, a list of texts in 2018
    "category": "VARCHAR[]",
    "categories": "VARCHAR[][]",  # 2014
    "brand": "VARCHAR",
    "price": "VARCHAR",  # 12.99 in 2014, "$12.99" in 2018, where broken pages left style sheets too
}
INTERACTIONS = """
    SELECT reviewerID AS "user", asin AS item, unixReviewTime AS "time", rowid AS position
    FROM reviews"""
ITEMS = r"""
    SELECT asin AS item, title, rowid AS position, brand,
        CASE json_type(description)
            WHEN 'ARRAY' THEN array_to_string(description::VARCHAR[], ' ')
            ELSE description->>'$' END AS description,
        coalesce(
            category,
            list_filter(flat, lambda name, place: list_position(flat, name) = place)
        ) AS categories,
        try_cast(regexp_extract(replace(price, ',', ''), '^\$?(\d+(\.\d+)?)$', 1) AS DOUBLE)
            AS price
    FROM (SELECT *, rowid, flatten(categories) AS flat FROM metadata)"""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read reviews and, if given, metadata; the releases of 2014 and 2018 alike."""
    raw.read_json_lines("reviews", files["reviews"], REVIEW_COLUMNS)
    if "metadata" in files:
        raw.read_json_lines("metadata", files["metadata"], ITEM_COLUMNS)
    return raw.source_data(INTERACTIONS, ITEMS if "metadata" in files else None)
