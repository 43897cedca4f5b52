"""Source `steam`: reviews and games of the Steam store, crawled by the McAuley lab (UCSD).

    steam_reviews.json.gz   1.3 GB, 7.8 million reviews:
                            username, product_id, date "YYYY-MM-DD", text, …
    steam_games.json.gz     a few MB, 32 thousand games:
                            id, app_name, title, genres, tags, developer, publisher, price, …

Page: https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data ("Version 2: Review Data" and
"Version 2: Item metadata"); for research, with a citation. Every line is a Python dict with u''
strings. Leave the files as they are, or gunzip them.

A user is a `username`, an item is a `product_id`, and the time is midnight (UTC) of the day of the
review. Reviews of one user on one day keep the order of the file. The title of a game is its
`app_name`, or else its `title`; games that are not in steam_games have no title. These columns are
kept for embeddings: `tags` (or else `genres`) as categories, `developer` (or else `publisher`) as
brand, and `price` in dollars. Prices like "Free to Play" become 0, and other texts become null.
"""

from collections.abc import Mapping
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
REVIEW_COLUMNS = {"username": "VARCHAR", "product_id": "VARCHAR", "date": "DATE"}
GAME_COLUMNS = {
    **dict.fromkeys(("id", "app_name", "title", "developer", "publisher", "price"), "VARCHAR"),
    "tags": "VARCHAR[]",
    "genres": "VARCHAR[]",
}
INTERACTIONS = """
    SELECT username AS "user", product_id AS item, epoch("date")::BIGINT AS "time",
        rowid AS position
    FROM steam_reviews"""
GAMES = """
    SELECT id AS item, coalesce(nullif(app_name, ''), title) AS title,
        coalesce(tags, genres) AS categories,
        coalesce(nullif(developer, ''), publisher) AS brand,
        CASE WHEN price ILIKE 'free%' THEN 0 ELSE try_cast(price AS DOUBLE) END AS price,
        rowid AS position
    FROM steam_games"""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the two files.

    Raises:
        UsageError: a file is not as described above; the message names file and line.
    """
    raw.read_json_lines("steam_reviews", files["reviews"], REVIEW_COLUMNS)
    raw.read_json_lines("steam_games", files["games"], GAME_COLUMNS)
    return raw.source_data(INTERACTIONS, GAMES)
