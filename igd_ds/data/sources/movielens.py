"""Source `movielens`: ratings and movies of GroupLens, in every size.

    100K            u.data        user TAB item TAB rating TAB timestamp
                    u.item        id|title|date|video|link|19 flags
    1M, 10M         ratings.dat   user::item::rating::timestamp
                    movies.dat    id::title::genre|genre|…
    20M, 25M, 32M   ratings.csv   userId,movieId,rating,timestamp (a header)
                    movies.csv    movieId,title,genres (a header)

Page: https://grouplens.org/datasets/movielens/ (ml-100k.zip 5 MB, ml-1m.zip 6 MB, ml-10m.zip 63 MB,
ml-20m.zip 190 MB, ml-25m.zip 250 MB, ml-32m.zip 239 MB). Unpack the archive and give the two files
of one size. The data are free for research; passing them on or commercial use needs permission.
Files are recognised by these names, with or without ".gz".

Every rating is an interaction, whatever its stars. The timestamps are seconds. Titles keep their
year ("Toy Story (1995)"). They are read as UTF-8 or, if they are not UTF-8 (100K and 1M), as
Latin-1. Genres become categories. All movies belong to the catalogue, rated or not.
"""

from collections.abc import Mapping
from pathlib import Path

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, open_raw
from igd_ds.errors import UsageError

RATINGS = {"u.data": "\t", "ratings.dat": "::", "ratings.csv": ","}  # file name → delimiter
MOVIES = {"u.item": "|", "movies.dat": "::", "movies.csv": ","}
FILES = {"ratings": FileKind(names=tuple(RATINGS)), "movies": FileKind(names=tuple(MOVIES))}
RATING_COLUMNS = {
    "userId": "VARCHAR",
    "movieId": "VARCHAR",
    "rating": "DOUBLE",
    "timestamp": "BIGINT",
}
# The flags of u.item in the order of the file (u.genre); the first means "none of these".
GENRES = """unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy
Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"""
NO_GENRES = "(no genres listed)"
INTERACTIONS = """
    SELECT "userId" AS "user", "movieId" AS item, "timestamp" AS "time", rowid AS position
    FROM ratings"""
ITEMS = """
    SELECT "movieId" AS item, title, nullif({genres}, []) AS categories, rowid AS position
    FROM movies"""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the two files.

    Raises:
        UsageError: a file is not as described above; the message names file and line.
    """
    (ratings,), (movies,) = files["ratings"], files["movies"]
    rating_name, movie_name = (path.name.removesuffix(".gz") for path in (ratings, movies))
    if list(RATINGS).index(rating_name) != list(MOVIES).index(movie_name):
        raise UsageError(
            f"{ratings} and {movies} are of different MovieLens sizes; give the two files of one "
            "folder"
        )

    header = rating_name == "ratings.csv"
    quote = '"' if header else ""
    delimiter = RATINGS[rating_name]
    raw.read_csv(
        "ratings", [ratings], RATING_COLUMNS, delimiter=delimiter, header=header, quote=quote
    )
    columns, genres = _flagged_genres() if movie_name == "u.item" else _listed_genres()
    raw.read_csv(
        "movies",
        [movies],
        {"movieId": "VARCHAR", "title": "VARCHAR"} | columns,
        delimiter=MOVIES[movie_name],
        header=header,
        encoding=encoding_of(movies),
        quote=quote,
    )
    return raw.source_data(INTERACTIONS, ITEMS.format(genres=genres), whole_catalogue=True)


def _flagged_genres() -> tuple[dict[str, str], str]:
    """Return the columns of u.item behind the title, and the SQL for a list of genres."""
    flags = {f"flag{place}": genre for place, genre in enumerate(GENRES.split())}
    columns = dict.fromkeys(("release", "video", "link", *flags), "VARCHAR")
    # $$…$$ is a SQL text that may hold quotes. The first flag is no genre.
    set_genres = ", ".join(
        f"CASE {flag} WHEN '1' THEN $${flags[flag]}$$ END" for flag in list(flags)[1:]
    )
    return columns, f"[genre FOR genre IN [{set_genres}] IF genre IS NOT NULL]"


def _listed_genres() -> tuple[dict[str, str], str]:
    """Return the column behind the title in the other files, and the SQL for a list of genres."""
    listed = "string_split(genres, '|')"
    genres = f"[genre FOR genre IN {listed} IF genre NOT IN ('', '{NO_GENRES}')]"
    return {"genres": "VARCHAR"}, genres


def encoding_of(path: Path) -> str:
    """Return "utf-8" if a file of some megabytes can be decoded as that, otherwise "latin-1"."""
    try:
        with open_raw(path) as file:
            file.read().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"
