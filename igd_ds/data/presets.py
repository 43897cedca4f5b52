"""Presets: the papers' datasets, one name each, with the counts the papers print.

A preset fills in what the command line leaves open. What its dataset is expected to count stands beside it; `prepare_data.py`
prints found against expected and changes nothing for it. `rows`: IGD Table 1 (train, valid, test rows); `interactions`, `users`,
`items`: MTC Table 2.
"""

from dataclasses import dataclass, field

# D3's published script: reviews of this window, its start moved back until 10,000 items are left.
D3_WINDOW = {"window_start": "2017-10-01", "window_end": "2018-11-01"}
D3 = {"protocol": "d3", "k_core": 5, "max_history": 10, "min_items": 10_000, "titles": "d3"}
LEAVE_ONE_OUT = {"protocol": "leave-one-out", "k_core": 5, "max_history": 20}


@dataclass(frozen=True)
class Preset:
    """`options` are flags of igd prepare, `expected` counts by name, `paper` where they are printed."""

    source: str
    options: dict
    paper: str
    expected: dict[str, int] = field(default_factory=dict)


PRESETS = {
    "cds": Preset(
        "amazon-2018",
        {**D3, **D3_WINDOW, "domain": "CDs"},
        "IGD Table 1",
        {"items": 14_239, "train": 148_685, "valid": 18_586, "test": 18_587},
    ),
    "games": Preset(
        "amazon-2018",
        {**D3, **D3_WINDOW, "domain": "video games"},
        "IGD Table 1",
        {"items": 11_037, "train": 201_613, "valid": 25_202, "test": 25_203},
    ),
    "toys": Preset(
        "amazon-2018",
        {**D3, **D3_WINDOW, "domain": "toys"},
        "IGD Table 1",
        {"items": 11_252, "train": 112_755},
    ),
    "books": Preset(
        "amazon-2018",
        {**D3, **D3_WINDOW, "domain": "books"},
        "IGD Table 1",
        {"items": 41_722, "train": 682_998, "valid": 85_376, "test": 85_376},
    ),
    "sports": Preset(
        "amazon-2018",
        {**D3, **D3_WINDOW, "domain": "sports and outdoor products"},
        "D3's protocol; not in IGD",
    ),
    "steam": Preset(
        "steam", {**D3, "domain": "games"}, "IGD Table 6 (about)", {"interactions": 982_000}
    ),
    "instruments-2023": Preset(
        "amazon-2023",
        {**LEAVE_ONE_OUT, "domain": "musical instruments"},
        "MTC Table 2",
        {"interactions": 511_836, "users": 57_439, "items": 24_587},
    ),
    "industrial-2023": Preset(
        "amazon-2023",
        {**LEAVE_ONE_OUT, "domain": "industrial and scientific products"},
        "MTC Table 2",
        {"interactions": 412_947, "users": 50_985, "items": 25_847},
    ),
    # The counts are those of S3-Rec's Yelp of 2019, whose window ends with the first second of the last day.
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
    # MTC prints the raw file's counts (3,883 films are listed, 3,706 rated); its text says 5-core, which leaves fewer.
    "ml-1m": Preset(
        "movielens",
        {**LEAVE_ONE_OUT, "domain": "movies"},
        "MTC Table 2",
        {"interactions": 1_000_209, "users": 6_040, "items": 3_883},
    ),
}
