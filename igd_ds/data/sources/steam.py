"""Source `steam`: reviews and games of the Steam store, crawled by the McAuley lab (UCSD).

    steam_reviews.json.gz   1.3 GB, 7.8 million reviews: username, product_id, date "YYYY-MM-DD", text, …
    steam_games.json.gz     a few MB, 32 thousand games: id, app_name, title, genres, tags, developer, publisher, price, …

Every line is a Python dict with u'' strings. Page: https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data ("Version 2: Review
Data" and "Version 2: Item metadata"); for research, with a citation. Leave the files as they are, or gunzip them.

A user is a `username`, an item a `product_id`, the time the review's day at midnight UTC: reviews of one user on one day keep the
order of the file. A game's title is `app_name`, else `title`; games that are not in steam_games have none. Kept for embeddings:
`tags` (else `genres`) as categories, `developer` (else `publisher`) as brand, `price` in dollars, where texts like "Free to Play"
are 0 and other texts nothing.
"""

from pathlib import Path

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind

FILES = {
    "reviews": FileKind(
        keys=frozenset({"username", "product_id", "date"}), names=("steam_reviews.json",)
    ),
    "games": FileKind(keys=frozenset({"app_name", "id"}), names=("steam_games.json",)),
}
INTERACTIONS = """
    SELECT username AS "user", product_id AS item, epoch("date")::BIGINT AS "time", rowid AS position FROM steam_reviews"""
GAMES = """
    SELECT id AS item, coalesce(nullif(app_name, ''), title) AS title, coalesce(tags, genres) AS categories,
        coalesce(nullif(developer, ''), publisher) AS brand,
        CASE WHEN price ILIKE 'free%' THEN 0 ELSE try_cast(price AS DOUBLE) END AS price, rowid AS position
    FROM steam_games"""


def read(raw: RawReader, files: dict[str, list[Path]]) -> SourceData:
    """Read the two files. Raises ValueError naming file and line for what is not as described above."""
    texts = dict.fromkeys(("id", "app_name", "title", "developer", "publisher", "price"), "VARCHAR")
    raw.read_json_lines(
        "steam_reviews",
        files["reviews"],
        {"username": "VARCHAR", "product_id": "VARCHAR", "date": "DATE"},
    )
    raw.read_json_lines(
        "steam_games", files["games"], texts | {"tags": "VARCHAR[]", "genres": "VARCHAR[]"}
    )
    return raw.source_data(INTERACTIONS, GAMES)
