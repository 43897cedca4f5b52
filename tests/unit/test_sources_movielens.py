"""Source `movielens` in all published forms and both encodings, against plain Python."""

import csv
import gzip
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import events_of, items_of, reading, refused_or_read

from igd_ds.data.sources.movielens import GENRES
from igd_ds.errors import UsageError

RATINGS = [
    (1, 3, 5, 978300760),
    (1, 1, 3.5, 978302109),
    (6040, 1, 1, 956704887),
    (2, 3, 4, 978300760),
    (1, 3, 0.5, 978300759),
]
MOVIES = [
    (1, "Toy Story (1995)", ["Animation", "Children's", "Comedy"]),
    (3, "Cité des enfants perdus, La (1995)", ["Sci-Fi"]),
    (4, '"Great Performances" Cats (1998)', []),
    (10, "And God Created Woman (Et Dieu… créa la femme) (1956)", ["Drama"]),
    (2, "Shanghai Triad (Yao a yao yao dao waipo qiao) (1995)", ["Drama", "Western"]),
]


def u_item(movies):
    rows = []
    for key, title, genres in movies:
        flags = [str(int(genre in genres)) for genre in GENRES.split()]
        rows.append(
            "|".join(
                [
                    str(key),
                    title,
                    "01-Jan-1995",
                    "",
                    "http://us.imdb.com/M/title-exact?x%20(1995)",
                    *flags,
                ]
            )
            + "\n"
        )
    return "".join(rows)


def csv_text(header, rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # lines end in \r\n, as GroupLens's do
    writer.writerows([header, *rows])
    return text.getvalue()


def files_of(folder, form, movies, encoding="utf-8"):
    """Write the two files of a size; return their folder."""
    folder.mkdir()
    joined = [(key, title, "|".join(genres)) for key, title, genres in movies]
    ratings, text, names = {
        "tab": (
            "".join("\t".join(map(str, row)) + "\n" for row in RATINGS),
            u_item(movies),
            ("u.data", "u.item"),
        ),
        "colons": (
            "".join("::".join(map(str, row)) + "\n" for row in RATINGS),
            "".join("::".join(map(str, row)) + "\n" for row in joined),
            ("ratings.dat", "movies.dat"),
        ),
        "csv": (
            csv_text(["userId", "movieId", "rating", "timestamp"], RATINGS),
            csv_text(
                ["movieId", "title", "genres"],
                [(key, title, genres or "(no genres listed)") for key, title, genres in joined],
            ),
            ("ratings.csv", "movies.csv"),
        ),
    }[form]

    (folder / names[0]).write_bytes(ratings.encode())
    (folder / names[1]).write_bytes(text.encode(encoding))
    return folder


@pytest.mark.parametrize("form", ["tab", "colons", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_movielens_equals_plain_parsing(tmp_path, form, encoding):
    movies = [
        (key, title.replace("…", "...") if encoding == "latin-1" else title, genres)
        for key, title, genres in MOVIES
    ]
    folder = files_of(tmp_path / "ml", form, movies, encoding)
    (folder / "README.txt").write_text("SUMMARY & USAGE LICENSE")
    (folder / "u.user").write_text("1|24|M|technician|85711\n")
    with reading("movielens", [folder]) as data:
        assert events_of(data) == [(str(user), str(item), at) for user, item, _, at in RATINGS]
        expected = {
            str(key): (title, None, None, genres or None, None, None)
            for key, title, genres in movies
        }
        assert items_of(data) == expected and len(data.titles) == 5  # all movies, rated or not

    for path in folder.iterdir():  # gzip makes no difference
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with reading("movielens", [folder]) as data:
        assert items_of(data) == expected and len(events_of(data)) == len(RATINGS)


def test_movielens_refuses(tmp_path):
    folder = files_of(tmp_path / "a", "csv", MOVIES)
    other = files_of(tmp_path / "b", "colons", MOVIES)
    for inputs, message in [
        ([folder / "ratings.csv"], "movies"),
        (
            [folder / "ratings.csv", other / "movies.dat"],
            "ratings.csv and .*movies.dat are of different MovieLens sizes",
        ),
        ([folder, other], "ratings"),
    ]:
        with pytest.raises(UsageError, match=message), reading("movielens", inputs):
            pass
    for name, text, message in [
        (
            "ratings.dat",
            "1::3::5::978300760\n1::3::5\n",
            r"ratings.dat: 1 of \d lines cannot be used .*line 2",
        ),
        (
            "ratings.dat",
            "1::3::5::978300760\n1::3::5::soon\n",
            r"ratings.dat: 1 of 2 lines cannot be used .*line 2",
        ),
        (
            "ratings.dat",
            "1::3::5::978300760\n1::3::5::978300760000\n",
            "1 look like seconds and 1 like milliseconds",
        ),
        ("ratings.dat", "", r"ratings.dat.*: 0 of 0 interactions"),
        ("movies.dat", "1::Toy Story (1995)\n", "movies.dat: 1 of"),
    ]:
        before = (other / name).read_text()
        (other / name).write_text(text)
        with pytest.raises(UsageError, match=message), reading("movielens", [other]):
            pass
        (other / name).write_text(before)
    (folder / "movies.csv").write_text("movieId,name\r\n1,x\r\n")
    with (
        pytest.raises(UsageError, match="movies.csv: no column title, genres"),
        reading("movielens", [folder]),
    ):
        pass

    path = other / "movies.dat"
    (other / "movies.dat.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()
    with (
        pytest.raises(UsageError, match="movies.dat.gz: not a whole gzip file"),
        reading("movielens", [other]),
    ):
        pass


CELLS = st.one_of(
    st.integers(-5, 10**19).map(str),
    st.text(max_size=8),
    st.sampled_from(["1", "3", "978300760", '"', "1|0", "|", "::"]),
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    form=st.sampled_from(["tab", "colons", "csv"]),
    ratings=st.lists(st.lists(CELLS, min_size=3, max_size=5), max_size=5),
    movies=st.lists(st.lists(CELLS, min_size=2, max_size=4), max_size=5),
    tail=st.binary(max_size=12),
)
def test_movielens_fuzz(tmp_path_factory, form, ratings, movies, tail):
    folder = files_of(tmp_path_factory.mktemp("fuzz") / "ml", form, MOVIES)
    delimiter = {"tab": ("\t", "|"), "colons": ("::", "::"), "csv": (",", ",")}[form]
    paths = sorted(
        folder.iterdir(), key=lambda path: path.name not in ("u.data", "ratings.dat", "ratings.csv")
    )
    for path, rows, mark in zip(paths, [ratings, movies], delimiter, strict=True):
        text = "".join(mark.join(row) + "\n" for row in rows)
        path.write_bytes(
            (path.read_bytes() if len(rows) % 2 else b"") + text.encode("utf-8", "replace") + tail
        )
    refused_or_read("movielens", paths)
