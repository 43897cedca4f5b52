"""Source `synthetic`: a seeded catalogue, and users whose next item follows a rule.

A model can learn the rule. Letters: N items, U users, I interactions.

Items come in series of three to eight volumes. A title looks like "Silent Harbor of Ambermoor,
Volume 3: Stone and Ash (Clothbound Edition)". First words are shared between series, the number of
the volume decides within a series, and everything after it is forced: volumes of a series share a
long prefix. As in real catalogues, about 5 % of the items are cold (no user ever meets them; each
is the last volume of its series), 0.5 % have the title of another item, some titles hold an HTML
entity, and ids are in random order.

The rule: with probability 1 − EPSILON the next item is one of three successors of the last item:
the next volume (0.6), the volume after it (0.25; both wrap around), or the first volume of one
other series, the same for the whole series (0.15). With probability EPSILON the next item is drawn
from the popularity law 1 / (rank + ZIPF_SHIFT) over warm items, with the most popular series first.
Users start with such a draw and meet 5 to 50 items (10 on average). They are active within three
years, in whole days, so that equal timestamps occur.

A model that knows the rule ranks the successors first, then the most popular items. With the
default size and seed 0, on the test rows of leave-one-out, its expected HR@1 is 0.48 and its HR@10
is 0.83 (tests/unit/test_sources.py computes both). Ranking by training count reaches 0.12 in HR@10.
(The rule is about item ids. If two items share a title, matching by tokens can only give higher
rates.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igd_ds.data.dataset import Interactions, SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind
from igd_ds.errors import UsageError

DEFAULT_ITEMS, DEFAULT_USERS = 600, 1500
MIN_ITEMS = 10
EPSILON = 0.2
SUCCESSOR_PROBS = np.array([0.6, 0.25, 0.15])
ZIPF_SHIFT = 10.0
COLD_SHARE, SHARED_TITLE_SHARE = 0.05, 0.005
SERIES_SIZES = (3, 8)
SEQUENCE_LENGTHS = (5, 50)
MEAN_EXTRA_LENGTH = 5.0
FIRST_DAY, NUM_DAYS, MEAN_GAP_DAYS = 16_436, 1096, 10.0  # 2015-01-01, three years
DAY = 86_400  # seconds

# The words of titles: 32 of each list, 16 of KINDS.
ADJECTIVES = """Silent Golden Hidden Broken Crimson Distant Frozen Gentle Hollow Iron Jade Lonely
Midnight Northern Painted Quiet Restless Scarlet Twilight Velvet Wandering Winter Ancient Burning
Copper Desert Emerald Fallen Glass Haunted Ivory Lost"""
NOUNS = """Harbor Garden Mirror Crown River Lantern Orchard Compass Island Tower Bridge Forest
Letter Meadow Needle Ocean Palace Raven Shadow Temple Valley Window Anchor Beacon Castle Dragon
Engine Falcon Gate Horizon Journey Kingdom"""
PLACE_STARTS = """Amber Birch Clear Dun Elder Fair Green Hazel Inver Kings Lake Maple North Oak Pine
Queens Red Stone Thorn Upper Vale West Ash Black Cold Deep East Fern Glen High Lang Moss"""
PLACE_ENDS = """moor ford ton field wick ham dale port mere stead bury gate haven cliff brook wood
ridge holm mouth shore land combe worth well burn crest den fall grove hurst point spire"""
KINDS = """Volume Book Part Tale Chapter Episode Chronicle Record Journal Folio Canto Legend Story
Scroll Season Cycle"""
SUBTITLES = """Stone Ash Fire Water Bone Silver Salt Smoke Thunder Honey Wheat Rust Silk Ink Snow
Feather Clay Wine Gold Mist Thorn Ember Frost Dust Oak Pearl Rain Steel Copper Moon Sand Iron"""
EDITIONS = "Clothbound|Paperback|Cloth &amp; Board|Illustrated"
FILES: dict[str, FileKind] = {}


@dataclass(frozen=True)
class Chain:
    """A catalogue and its rule.

    Example:
        >>> chain = make_chain(600, seed=0)
        >>> chain.successors[5]  # the three items that may follow item 5
    """

    titles: list[str]
    """N titles."""
    successors: np.ndarray
    """int32 (N, 3), taken with SUCCESSOR_PROBS."""
    draw_probs: np.ndarray
    """float64 (N,), the popularity law; 0 for cold items."""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Make the items and users that the request asks for; read no files.

    The sizes are `num_items` and `num_users` of the request; 0 takes the demo's 600 and 1500.
    """
    request = raw.request
    num_items, num_users = request.num_items or DEFAULT_ITEMS, request.num_users or DEFAULT_USERS
    return make_synthetic(num_items, num_users, request.seed)


def make_chain(num_items: int, seed: int) -> Chain:
    """Make the catalogue and the rule.

    There are names for 2²⁴ series (90 million items) before two series share one.
    """
    rng = np.random.default_rng([seed, 0])

    # The sizes of the series; the last one is cut to the number of items.
    low, high = SERIES_SIZES
    sizes = rng.integers(low, high + 1, size=num_items // low + 1)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), num_items) + 1]
    sizes[-1] -= sizes.sum() - num_items
    num_series = len(sizes)
    first = np.cumsum(sizes) - sizes
    series = np.repeat(np.arange(num_series), sizes)
    volume = np.arange(num_items) - first[series]

    # In some series the last volume is cold.
    has_cold = (rng.random(num_series) < COLD_SHARE * num_items / num_series) & (sizes >= low)
    warm_sizes = sizes - has_cold
    is_warm = volume < warm_sizes[series]

    # The rule.
    sequel = first[(np.arange(num_series) + rng.integers(1, max(num_series, 2))) % num_series]
    wrapped = [first[series] + (volume + step) % warm_sizes[series] for step in (1, 2)]
    successors = np.stack([*wrapped, sequel[series]], axis=1)
    draw = is_warm / (np.arange(1, num_items + 1) + ZIPF_SHIFT)

    # The titles, some of them shared.
    titles = np.asarray(_titles(series, volume, rng), dtype=object)
    num_copies = int(num_items * SHARED_TITLE_SHARE)
    copies, originals = np.split(rng.permutation(num_items)[: 2 * num_copies], 2)
    titles[copies] = titles[originals]

    # So far the number of an item was its rank: series by series, the most popular first. The ids
    # are a random permutation of the ranks.
    id_of = rng.permutation(num_items)
    rank_of = np.argsort(id_of)
    return Chain(
        titles[rank_of].tolist(),
        id_of[successors][rank_of].astype(np.int32),
        (draw / draw.sum())[rank_of],
    )


def _titles(series: np.ndarray, volume: np.ndarray, rng: np.random.Generator) -> list[str]:
    num_series = int(series[-1]) + 1
    # An odd multiplier permutes the 2²⁴ names; near the golden ratio it spreads the first words
    # evenly.
    name = (np.arange(num_series) * 10_368_889 + rng.integers(1 << 24)) % (1 << 24)
    edition = rng.integers(len(EDITIONS.split("|")), size=num_series)
    subtitles = rng.integers(32, size=(2, len(series)))
    subtitles[1] = (subtitles[1] + (subtitles[1] == subtitles[0])) % 32  # never "Salt and Salt"

    def words(table: str, index: np.ndarray, separator: str | None = None) -> pa.Array:
        return pa.array(table.split(separator)).take(pa.array(index))

    # Per series: the words before the number, and the edition.
    place_start = words(PLACE_STARTS, (name >> 9) & 31)
    place_end = words(PLACE_ENDS, (name >> 4) & 31)
    place = pc.binary_join_element_wise(place_start, place_end, "")
    adjective = words(ADJECTIVES, name >> 19)
    noun = words(NOUNS, (name >> 14) & 31)
    kind = words(KINDS, name & 15)
    stem = pc.binary_join_element_wise(adjective, " ", noun, " of ", place, ", ", kind, " ", "")
    tail = pc.binary_join_element_wise(" (", words(EDITIONS, edition, "|"), " Edition)", "")

    # Per item: the number and the subtitle.
    per_item = pa.array(series)
    number = pc.cast(pa.array(volume + 1), pa.string())
    first, second = (words(SUBTITLES, index) for index in subtitles)
    parts = [stem.take(per_item), number, ": ", first, " and ", second, tail.take(per_item)]
    return pc.binary_join_element_wise(*parts, "").to_pylist()


def make_synthetic(num_items: int, num_users: int, seed: int) -> SourceData:
    """Make the catalogue and the interactions of its users.

    Raises:
        UsageError: there are fewer than MIN_ITEMS items.
    """
    if num_items < MIN_ITEMS:
        raise UsageError(
            f"--num_items {num_items}: synthetic data needs at least {MIN_ITEMS} items"
        )
    chain = make_chain(num_items, seed)
    rng = np.random.default_rng([seed, 1])
    low, high = SEQUENCE_LENGTHS
    lengths = np.minimum(low + rng.geometric(1 / (MEAN_EXTRA_LENGTH + 1), size=num_users) - 1, high)
    longest = int(lengths.max())

    # All users step by step: each draws an item, or follows the rule.
    items = np.empty((num_users, longest), dtype=np.int32)
    cumulative, choices = np.cumsum(chain.draw_probs), np.cumsum(SUCCESSOR_PROBS)
    for step in range(longest):
        active = np.flatnonzero(lengths > step)
        draws = np.searchsorted(cumulative, rng.random(len(active)) * cumulative[-1], side="right")
        if step:
            which = np.searchsorted(choices[:-1], rng.random(len(active)), side="right")
            follows = chain.successors[items[active, step - 1], which]
            draws = np.where(rng.random(len(active)) < EPSILON, draws, follows)
        items[active, step] = draws

    # The days: a first day, then gaps.
    days = rng.geometric(1 / (MEAN_GAP_DAYS + 1), size=(num_users, longest)) - 1
    days[:, 0] = FIRST_DAY + rng.integers(NUM_DAYS, size=num_users)
    valid = np.arange(longest) < lengths[:, None]
    timestamps = (np.cumsum(days, axis=1) * DAY)[valid]
    users = np.repeat(np.arange(num_users, dtype=np.int64), lengths)
    return SourceData(chain.titles, None, Interactions(users, items[valid], timestamps))
