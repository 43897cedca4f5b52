"""Source `yelp`: reviews and businesses of the Yelp Open Dataset (the academic dataset).

    yelp_academic_dataset_review.json     5.3 GB, 7.0 million reviews:
                                          user_id, business_id, date "YYYY-MM-DD HH:MM:SS", text, …
    yelp_academic_dataset_business.json   120 MB, 150 thousand businesses:
                                          business_id, name, categories, city, state, …

Page: https://business.yelp.com/data/resources/open-dataset/ (the archive "JSON", 4 GB; unpack it).
The files are JSON lines, plain or gzip. Yelp's dataset terms allow academic, non-commercial use and
no passing on. The current release starts in 2005 and ends in January 2022; the papers use a range
of dates, which the time window of the protocol cuts out.

The times have no zone and are taken as UTC. An item is a business, and its title is the `name`;
businesses of one chain share a title. These columns are kept for embeddings: `categories`, one
text, is split at its commas (so that "Books, Mags, Music & Video", one category, becomes three);
city and state make the description. There is no brand and no price.
"""

from collections.abc import Mapping
from pathlib import Path

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind

FILES = {
    "reviews": FileKind(
        keys=frozenset({"review_id", "user_id", "business_id", "date"}),
        names=("yelp_academic_dataset_review.json",),
    ),
    "businesses": FileKind(
        keys=frozenset({"business_id", "name", "categories"}),
        names=("yelp_academic_dataset_business.json",),
    ),
}
REVIEW_COLUMNS = {"user_id": "VARCHAR", "business_id": "VARCHAR", "date": "TIMESTAMP"}
BUSINESS_COLUMNS = dict.fromkeys(("business_id", "name", "city", "state", "categories"), "VARCHAR")
INTERACTIONS = """
    SELECT user_id AS "user", business_id AS item, epoch("date")::BIGINT AS "time",
        rowid AS position
    FROM yelp_reviews"""
BUSINESSES = """
    SELECT business_id AS item, "name" AS title,
        nullif(concat_ws(', ', nullif(city, ''), nullif(state, '')), '') AS description,
        nullif(
            [trim(part) FOR part IN string_split(categories, ',') IF trim(part) <> ''], []
        ) AS categories,
        rowid AS position
    FROM yelp_businesses"""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the two files.

    Raises:
        UsageError: a file is not as described above; the message names file and line.
    """
    raw.read_json_lines("yelp_reviews", files["reviews"], REVIEW_COLUMNS)
    raw.read_json_lines("yelp_businesses", files["businesses"], BUSINESS_COLUMNS)
    return raw.source_data(INTERACTIONS, BUSINESSES)
