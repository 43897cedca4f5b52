"""Presets: the datasets of the papers, one name each, with the counts that the papers print.

A preset sets the options that the command line leaves open. `igd prepare` prints the counts that it
found next to the counts of the paper; a mismatch is not an error. The counts `train`, `valid` and
`test` are rows from IGD Table 1; `interactions`, `users` and `items` are from MTC Table 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# D3's published script: the reviews of this window. The start of the window moves back until 10,000
# items are left.
D3_WINDOW = {"window_start": "2017-10-01", "window_end": "2018-11-01"}
D3: dict[str, str | int] = {
    "protocol": "d3",
    "k_core": 5,
    "max_history": 10,
    "min_items": 10_000,
    "titles": "d3",
}
LEAVE_ONE_OUT: dict[str, str | int] = {
    "protocol": "leave-one-out",
    "k_core": 5,
    "max_history": 20,
}

PAGES = {
    "amazon-2018": "https://nijianmo.github.io/amazon/",
    "amazon-2023": "https://amazon-reviews-2023.github.io/",
    "movielens": "https://grouplens.org/datasets/movielens/",
    "steam": "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
    "yelp": "https://business.yelp.com/data/resources/open-dataset/",
}
"""Source of a preset → the page that offers its files."""


@dataclass(frozen=True)
class Preset:
    """A dataset of a paper: how to make it and what it should count."""

    source: str
    """A name in igd_ds/data/sources/__init__.py."""
    options: Mapping[str, str | int]
    """Flags of `igd prepare` and their values."""
    paper: str
    """Where the expected counts are printed."""
    expected: Mapping[str, int] = field(default_factory=dict)
    """The counts, by name."""

    @property
    def page(self) -> str:
        """The page that offers the files of the source."""
        return PAGES[self.source]


def amazon_2018(domain: str, paper: str, expected: Mapping[str, int]) -> Preset:
    """Return the preset of an Amazon 2018 category under D3's protocol."""
    return Preset("amazon-2018", {**D3, **D3_WINDOW, "domain": domain}, paper, expected)


def amazon_2023(domain: str, expected: Mapping[str, int]) -> Preset:
    """Return the preset of an Amazon 2023 category under MTC's protocol."""
    return Preset("amazon-2023", {**LEAVE_ONE_OUT, "domain": domain}, "MTC Table 2", expected)


PRESETS = {
    "cds": amazon_2018(
        "CDs", "IGD Table 1", {"items": 14_239, "train": 148_685, "valid": 18_586, "test": 18_587}
    ),
    "games": amazon_2018(
        "video games",
        "IGD Table 1",
        {"items": 11_037, "train": 201_613, "valid": 25_202, "test": 25_203},
    ),
    "toys": amazon_2018("toys", "IGD Table 1", {"items": 11_252, "train": 112_755}),
    "books": amazon_2018(
        "books", "IGD Table 1", {"items": 41_722, "train": 682_998, "valid": 85_376, "test": 85_376}
    ),
    "sports": amazon_2018("sports and outdoor products", "D3's protocol; not in IGD", {}),
    "steam": Preset(
        "steam", {**D3, "domain": "games"}, "IGD Table 6 (about)", {"interactions": 982_000}
    ),
    "instruments-2023": amazon_2023(
        "musical instruments",
        {"interactions": 511_836, "users": 57_439, "items": 24_587},
    ),
    "industrial-2023": amazon_2023(
        "industrial and scientific products",
        {"interactions": 412_947, "users": 50_985, "items": 25_847},
    ),
    # These are the counts of S3-Rec's Yelp of 2019, whose window ends with the first second of the
    # last day.
    "yelp": Preset(
        "yelp",
        {
            **LEAVE_ONE_OUT,
            "window_start": "2019-01-01",
            "window_end": "2019-12-31",
            "domain": "businesses",
        },
        "MTC Table 2",
        {"interactions": 316_354, "users": 30_431, "items": 20_033},
    ),
    # MTC prints the counts of the raw file (which lists 3,883 films, of which 3,706 are rated). The
    # text of the paper says 5-core, which leaves fewer.
    "ml-1m": Preset(
        "movielens",
        {**LEAVE_ONE_OUT, "domain": "movies"},
        "MTC Table 2",
        {"interactions": 1_000_209, "users": 6_040, "items": 3_883},
    ),
}
