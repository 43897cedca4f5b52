"""Make synthetic raw files in the exact published forms, fast, for benchmarks.

    python tools/bench/_raw_files.py FORM REVIEWS FOLDER [--gz]

Pieces of lines are rendered once, and lines are joined from them. `draw` decides who meets what
(seed 0): R reviews have about 0.3 R users and R/17 items, both with power-law activity, so that the
5-core of all time keeps about half of the reviews. A user is active around a time of their own, in
days, with a density that grows with the fourth power of time over 1996-2018. The files are grouped
by item as the published files are, and 0.5 % of the lines repeat the line before.

Texts are made-up words with log-normal lengths as in real reviews. One body serves many reviews
that stand far apart. About 2 % of the items have no metadata line, and 2 % have two lines (every
tenth of them with another title). Some titles are missing, debris or too long, or hold entities.
The forms with histories (d3-csv, lcrec-json, sequences) hold the same reviews, by user and day, and
one title per item.
"""

import argparse
import collections
import datetime
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SEED = 0
BATCH = 1 << 17  # lines that are joined at a time, about 64 MB
THREADS = 2
BODIES = 1 << 15  # texts that are rendered; all reviews share them
USERS_PER_REVIEW, REVIEWS_PER_ITEM = 0.3, 17
USER_TAIL, ITEM_TAIL, MOST_ACTIVE = 1.4, 1.1, 3_000.0  # P(activity > x) ~ x^-tail
SINGLE_USERS = 0.6  # users with one review
REPEATED_LINES = 0.005
NO_METADATA, TWO_METADATA = 0.02, 0.02
FIRST_DAY, LAST_DAY = 9_636, 17_806  # 1996-05-20 to 2018-10-02
D3_HISTORY = 10
ACTIVE_DAYS = 300  # scale of a user's activity around its centre
UPPER, BASE32, DECIMAL = (
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567",
    "0123456789",
)
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
GENRES = """Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir
Horror Musical Mystery Romance"""
D3_HEADER = (
    "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
)
Columns = list[pa.Array | bytes]
"""The pieces of lines, joined from left to right; constant bytes are the same on every line."""


@dataclass(frozen=True)
class Draw:
    """Reviews in file order."""

    users: np.ndarray
    """int32 (R,)."""
    items: np.ndarray
    """int32 (R,)."""
    days: np.ndarray
    """int32 (R,), since 1970."""
    num_items: int

    def ordered(self, *keys: np.ndarray) -> "Draw":
        """Return the reviews sorted by keys, the last one first, as for np.lexsort."""
        order = np.lexsort(keys)
        return Draw(self.users[order], self.items[order], self.days[order], self.num_items)


def draw(num_reviews: int) -> Draw:
    """Draw who met what and when, grouped by item and in random order within an item."""
    rng = np.random.default_rng([SEED, num_reviews])
    num_users, num_items = int(num_reviews * USERS_PER_REVIEW), num_reviews // REVIEWS_PER_ITEM

    def activity(size: int, tail: float, single: float) -> np.ndarray:
        """Return numbers of reviews, at least 1 each and num_reviews in all."""
        weights = np.minimum(rng.random(size) ** (-1 / tail), MOST_ACTIVE)
        weights *= rng.random(size) >= single
        return 1 + rng.multinomial(num_reviews - size, weights / weights.sum())

    # Users and their days.
    reviews_per_user = activity(num_users, USER_TAIL, SINGLE_USERS)
    users = np.repeat(np.arange(num_users, dtype=np.int32), reviews_per_user)
    centres = FIRST_DAY + (LAST_DAY - FIRST_DAY) * rng.random(num_users, dtype=np.float32) ** 0.2
    days = rng.standard_exponential(num_reviews, dtype=np.float32) * (
        ACTIVE_DAYS * rng.choice([-1, 1], num_reviews)
    )
    days = (centres[users] + days).astype(np.int32)
    days = np.where(days > LAST_DAY, 2 * LAST_DAY - days, days)
    days = np.clip(days, FIRST_DAY, LAST_DAY).astype(np.int32)

    # Items, and lines that repeat the line before.
    order = rng.permutation(num_reviews).astype(np.int32)
    users, days = users[order], days[order]
    items = np.repeat(np.arange(num_items, dtype=np.int32), activity(num_items, ITEM_TAIL, 0))
    again = 1 + np.flatnonzero(rng.random(num_reviews - 1) < REPEATED_LINES)
    for column in (users, days, items):
        column[again] = column[again - 1]
    return Draw(users, items, days, num_items)


def metadata_items(num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (item, variant) per metadata line.

    Some items have no line. Some have a second line, whose variant is 1 if it differs.
    """
    rng = np.random.default_rng([SEED, num_items, 1])
    chance = rng.random(num_items)
    lines = 1 + (chance > 1 - TWO_METADATA).astype(np.int64) - (chance < NO_METADATA)
    items = np.repeat(np.arange(num_items), lines)
    second = np.diff(items, prepend=-1) == 0
    return items, (second & (items % 10 == 0)).astype(np.int64)


# ---- pieces of lines


def mix(ids: np.ndarray, salt: int, size: int) -> np.ndarray:
    """Hash ids to [0, size)."""
    mixed = (ids.astype(np.uint64) + np.uint64(salt + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed ^ (mixed >> np.uint64(29))) % np.uint64(size)).astype(np.int64)


def digits(numbers: np.ndarray, alphabet: str, width: int) -> pa.Array:
    """Write numbers in the positional system of an alphabet, `width` (even) characters each."""
    base = len(alphabet) ** 2
    pairs = np.frombuffer(
        "".join(a + b for a in alphabet for b in alphabet).encode(), dtype=np.uint16
    )
    text = np.empty((len(numbers), width // 2), dtype=np.uint16)
    rest = numbers.astype(np.uint64)
    for place in range(width // 2 - 1, -1, -1):
        rest, digit = np.divmod(rest, np.uint64(base))
        text[:, place] = pairs[digit]
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(numbers), [None, pa.py_buffer(text)]
    )
    return pc.cast(fixed, pa.binary())


def codes(ids: np.ndarray, alphabet: str, width: int) -> Columns:
    """Return columns that spell a unique, random-looking code per id.

    A code has `width` characters: an even number, at least 6.
    """
    base = len(alphabet)
    columns: Columns = [
        digits(ids.astype(np.uint64) * np.uint64(1_000_003) % np.uint64(base**6), alphabet, 6)
    ]
    while (done := 6 * len(columns)) < width:
        part = min(width - done, 6)
        columns.append(digits(mix(ids, len(columns), base**part), alphabet, part))
    return columns


def asins(items: np.ndarray, num_items: int) -> pa.Array:
    """Spell ascending ASINs.

    40 % are ISBN-10 with leading zeros, the others are "B0" and eight characters.
    """
    isbns = num_items * 2 // 5
    split = int(np.searchsorted(items, isbns)) if np.all(np.diff(items) >= 0) else None
    if split is None:
        order = np.argsort(items, kind="stable")
        return asins(items[order], num_items).take(pa.array(np.argsort(order)))
    books = digits(
        1_713_353 + items[:split].astype(np.int64) * (9 * 10**9 // max(isbns, 1)), DECIMAL, 10
    )
    stride = 36**8 // (num_items + 1)
    others = digits(items[split:].astype(np.uint64) * np.uint64(stride), UPPER, 8)
    others = pc.binary_join_element_wise(pa.scalar(b"B0"), others, pa.scalar(b""))
    return pa.concat_arrays([books, others])


def pool(texts: list[str]) -> pa.Array:
    """Return rendered pieces as a binary array to take from."""
    return pa.array([text.encode() for text in texts], pa.binary())


def pick(pieces: pa.Array, index: np.ndarray) -> pa.Array:
    """Take pieces by index."""
    return pieces.take(pa.array(index))


def make_words(rng: np.random.Generator) -> np.ndarray:
    """Make 20,000 words, the frequent ones short, with some marks that need escapes."""
    starts = list("bcdfghlmnprstvw") + ["st", "tr", "gl", "ch", "th"]
    ends = list("aeiou") + ["ea", "ou", "an", "en", "in", "er", "on", "es", "at", "al"]
    syllables = np.array([start + end for start in starts for end in ends])
    lengths = 1 + (np.arange(20_000) > 150) + (np.arange(20_000) > 4_000)
    words = [
        "".join(row[:length])
        for row, length in zip(rng.choice(syllables, (20_000, 3)), lengths, strict=True)
    ]

    special = [
        '"great"',
        "don't",
        "café",
        "\n\n",
        "&",
        "5'10\"",
        "naïve",
        "a/b",
        "…",
        "\t",
        "😀",
        "C:\\",
        "“so”",
        "10,000",
        "<br />",
    ]
    for place, word in zip(range(40, 2_000, 120), special, strict=False):
        words[place] = word
    return np.array(words, dtype=object)


def texts(
    rng: np.random.Generator,
    words: np.ndarray,
    number: int,
    median: float,
    spread: float,
    most: int = 6_000,
) -> list[str]:
    """Make texts of log-normal length in words, capitalised, with sentences."""
    lengths = np.clip(rng.lognormal(np.log(median), spread, number), 1, most).astype(int)
    ranks = np.exp(rng.random(lengths.sum()) * np.log(len(words))).astype(int) - 1
    chosen = words[ranks]
    ends = np.flatnonzero(rng.random(len(chosen)) < 0.07)
    chosen[ends] = chosen[ends] + "."
    places = np.cumsum(lengths)
    return [" ".join(part).capitalize() for part in np.split(chosen, places[:-1])]


@dataclass(frozen=True)
class Titles:
    """Titles as pieces: a head and, for most heads, a space and a tail."""

    heads: list[str | None]
    """None makes a line without the title field."""
    tails: list[str]
    whole: int
    """The first `whole` heads get a tail."""

    def columns(
        self,
        items: np.ndarray,
        variants: np.ndarray,
        escape: Callable[[str], str],
        start: str,
        end: str,
        hole: str = "",
    ) -> Columns:
        """Return two columns that spell `start title end` per item, or `hole` without a title.

        A variant has another tail.
        """
        head = mix(items, 1, len(self.heads))
        tail = np.where(
            head < self.whole, 1 + mix(items + 50_000_017 * variants, 2, len(self.tails)), 0
        )
        missing = np.array([text is None for text in self.heads])[head]
        tail[missing] = len(self.tails) + 1
        heads = [hole if text is None else start + escape(text) for text in self.heads]
        tails = [end, *(f" {escape(text)}{end}" for text in self.tails), ""]
        return [pick(pool(heads), head), pick(pool(tails), tail)]


def make_titles(
    rng: np.random.Generator, words: np.ndarray, clean: bool = False, tail_words: int = 4
) -> Titles:
    """Make pieces of titles, with tails of about `tail_words` words.

    Unless `clean`, 3 % are missing, debris, too short, or about 20 words long.
    """
    plain = np.array([word.replace("\n\n", "-").replace("\t", "/") for word in words], dtype=object)
    heads: list[str | None] = [head.title() for head in texts(rng, plain, 7_000, 3, 0.4, 8)]
    tails = texts(rng, plain, 8_000, tail_words, 0.5, tail_words * 9 // 4)
    if clean:
        return Titles(heads, tails, len(heads))
    for place in range(0, 700, 4):
        heads[place : place + 3] = [
            f"{heads[place]} &amp;",
            f"&quot;{heads[place + 1]}&quot;",
            f" {heads[place + 2]}",
        ]
    tails[:200] = [f'{tail}"' for tail in tails[:200]]
    debris = '<span id="productTitle" class="a-size-large">Widget</span>'
    odd = [None, debris, "", '" "', "&quot;", "A", "Two  spaces", '"Quoted"', "Ab"]
    long = texts(rng, np.array(["one", "two", "three", "four", "five"], dtype=object), 60, 24, 0.1)
    exact = [" ".join(["word"] * number) for number in (20, 21)] + ["  ".join(["word"] * 11)]
    return Titles([*heads, *odd * 20, *long, *exact * 10], tails, len(heads))


# ---- forms: a function of (rng, draw) that returns the parts, one per file

Lines = Callable[..., Columns]


@dataclass(frozen=True)
class Part:
    """The lines of a file."""

    about: Sequence[np.ndarray]
    """Arrays (L,) that say what is on each line."""
    lines: Lines
    """Called with a random generator and slices of these arrays; returns columns."""


def two_parts(draw: Draw, reviews: Lines, metadata: Lines) -> list[Part]:
    """Return the parts of a form with a line per review and a line per item.

    `reviews` takes (users, items, days), and `metadata` takes (items, variants).
    """
    return [
        Part((draw.users, draw.items, draw.days), reviews),
        Part(metadata_items(draw.num_items), metadata),
    ]


def quoted(text: str) -> str:
    """Return a JSON string without its quotes."""
    return json.dumps(text)[1:-1]


def fields(**values) -> str:
    """Return the fields of a JSON object without its braces."""
    return json.dumps(values)[1:-1]


def python_quoted(text: str) -> str:
    """Return text as Python 2 prints it between single quotes."""
    # With both kinds of quotes in a text, the representation stands between single quotes.
    return ascii(text + "'\"")[1:-4]


def date_of(day: int) -> datetime.date:
    """Return a date of days since 1970."""
    return datetime.date(1970, 1, 1) + datetime.timedelta(days=int(day))


def day_pool(spell: Callable[[int], str]) -> pa.Array:
    """Return a piece per day from FIRST_DAY to LAST_DAY."""
    return pool([spell(day) for day in range(FIRST_DAY, LAST_DAY + 1)])


def other_asins(
    rng: np.random.Generator, number: int, lines: int, num_items: int, mark: bytes
) -> Columns:
    """Return columns that spell a list of `number` ASINs per line, each between marks.

    The brackets of the list are left out.
    """
    listed = [asins(rng.integers(num_items, size=lines), num_items) for _ in range(number)]
    return [piece for one in listed for piece in (mark, one, mark + b", ")][:-1] + [mark]


def american(day: int) -> str:
    """Spell a day as Amazon's reviewTime does."""
    date = date_of(day)
    return f"{date.strftime('%m')} {date.day}, {date.year}"


def amazon_2018(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return reviews and metadata of the 2018 release.

    Texts of about 270 characters make lines of about 466 characters.
    """
    words = make_words(rng)
    pieces = make_titles(rng, words)
    starts = pool(
        [
            f'{{"overall": {stars}.0, {vote}"verified": {bought}, "reviewTime": "'
            for stars in (1, 2, 3, 4, 4, 5, 5, 5, 5, 5)
            for vote in ("", "", "", '"vote": "2", ', '"vote": "1,024", ')
            for bought in ("true", "true", "false")
        ]
    )
    names, summaries = texts(rng, words, BODIES, 2, 0.3, 3), texts(rng, words, BODIES, 3, 0.6, 20)
    styles = ['"style": {"Format:": " Hardcover"}, ', "", '"style": {"Size:": " 7.0 oz"}, ']
    bodies = zip(names, texts(rng, words, BODIES, 20, 1.15), summaries, strict=True)
    bodies = pool(
        [
            f'", {styles[place % 3]}{fields(reviewerName=name, reviewText=text, summary=summary)}'
            for place, (name, text, summary) in enumerate(bodies)
        ]
    )
    dates = day_pool(lambda day: f'{american(day)}", "reviewerID": "A')
    times = day_pool(lambda day: f', "unixReviewTime": {day * 86_400}}}\n')

    def reviews(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        head, body = (rng.integers(len(part), size=len(users)) for part in (starts, bodies))
        day = days - FIRST_DAY
        user = codes(users, UPPER, 12)
        asin = asins(items, draw.num_items)
        return [
            pick(starts, head),
            pick(dates, day),
            *user,
            b'", "asin": "',
            asin,
            pick(bodies, body),
            pick(times, day),
        ]

    descriptions = texts(rng, words, 8_192, 70, 0.9)
    fronts = pool(
        [
            f"{{{fields(category=['Books', name], tech1='', description=[text], fit='')}, "
            for name, text in zip(names, descriptions, strict=False)
        ]
    )
    brands = []
    for place, name in enumerate(names[:4096]):
        brand = fields(tech2="", brand=name, feature=[name], rank=f"{place:,} in Books (")
        brands.append(f'], {brand}, "also_view": [')
    brands = pool(brands)
    broken = ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget{padding:14px}"
    spelled = ["", broken, *(f"${cents / 100:,.2f}" for cents in rng.integers(99, 200_000, 2_000))]
    prices = pool(
        [
            f'], {fields(main_cat="Books", similar_item="", date="", price=price)}, "asin": "'
            for price in spelled
        ]
    )
    image = "https://images-na.ssl-images-amazon.com/images/I/"
    images = [
        fields(imageURL=[f"{image}{n:09}L._SS40_.jpg"], imageURLHighRes=[f"{image}{n:09}L.jpg"])
        for n in range(4096)
    ]
    images = pool([f'", {piece}}}\n' for piece in images])

    def metadata(rng: np.random.Generator, items: np.ndarray, variants: np.ndarray) -> Columns:
        bought, viewed = (
            other_asins(rng, number, len(items), draw.num_items, b'"') for number in (8, 4)
        )
        parts = [
            pick(part, rng.integers(len(part), size=len(items)))
            for part in (fronts, brands, prices, images)
        ]
        title = pieces.columns(items, variants, quoted, '"title": "', '", ')
        asin = asins(items, draw.num_items)

        return [
            parts[0],
            *title,
            b'"also_buy": [',
            *bought,
            parts[1],
            *viewed,
            parts[2],
            asin,
            parts[3],
        ]

    return two_parts(draw, reviews, metadata)


def amazon_2014(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return reviews of the 2014 release as JSON lines, and metadata as Python-dict lines.

    The texts are as long as those of 2018.
    """
    words = make_words(rng)
    pieces = make_titles(rng, words)
    names, summaries = texts(rng, words, BODIES, 2, 0.3, 3), texts(rng, words, BODIES, 3, 0.6, 20)
    review_texts = texts(rng, words, BODIES, 20, 1.15)
    bodies = []
    for n, (name, text, summary) in enumerate(zip(names, review_texts, summaries, strict=True)):
        body = fields(
            reviewerName=name,
            helpful=[n % 3, n % 4],
            reviewText=text,
            overall=n % 5 + 1.0,
            summary=summary,
        )
        bodies.append(f'", {body}')
    bodies = pool(bodies)
    times = day_pool(
        lambda day: f', "unixReviewTime": {day * 86_400}, "reviewTime": "{american(day)}"}}\n'
    )

    def reviews(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        body = pick(bodies, rng.integers(len(bodies), size=len(users)))
        asin = asins(items, draw.num_items)
        return [
            b'{"reviewerID": "A',
            *codes(users, UPPER, 12),
            b'", "asin": "',
            asin,
            body,
            pick(times, days - FIRST_DAY),
        ]

    described = pool(
        [f"', 'description': {ascii(text)}, " for text in ["", *texts(rng, words, 8_192, 70, 0.9)]]
    )
    image = "'imUrl': 'http://ecx.images-amazon.com/images/I"
    spelled = ["", *(f"'price': {cents / 100}, " for cents in rng.integers(99, 20_000, 2_000))]
    prices = pool(
        [
            f"{image}/{n:09}L.jpg', {price}'related': {{'also_bought': ["
            for n, price in enumerate(spelled)
        ]
    )
    ends = pool(
        [
            f"]}}, 'salesRank': {{'Books': {n}}}, 'brand': '{name}', "
            f"'categories': [['Books'], ['Books', '{name}']]}}\n"
            for n, name in enumerate(map(python_quoted, names[:4096]))
        ]
    )

    def metadata(rng: np.random.Generator, items: np.ndarray, variants: np.ndarray) -> Columns:
        bought, viewed = (
            other_asins(rng, number, len(items), draw.num_items, b"'") for number in (20, 4)
        )
        text, price, end = (
            pick(part, rng.integers(len(part), size=len(items)))
            for part in (described, prices, ends)
        )
        title = pieces.columns(items, variants, python_quoted, "'title': '", "', ")
        front = [b"{", *title, b"'asin': '", asins(items, draw.num_items), text, price]
        return [*front, *bought, b"], 'bought_together': [", *viewed, end]

    return two_parts(draw, reviews, metadata)


def metadata_2023(
    rng: np.random.Generator, words: np.ndarray, pieces: Titles, num_items: int
) -> Lines:
    """Return the metadata lines of the 2023 release."""
    described = texts(rng, words, 8_192, 70, 0.9)
    names = texts(rng, words, 8_192, 2, 0.3, 3)
    prices, link = [None, 12.99, 199.0, "from 9.99"], "https://m.media-amazon.com/images/I/"
    scores = []
    for place, (name, text) in enumerate(zip(names, described, strict=True)):
        image = {
            "thumb": f"{link}{place:09}L.jpg",
            "large": None,
            "variant": "MAIN",
            "hi_res": None,
        }
        numbers = fields(
            average_rating=1 + place % 41 / 10,
            rating_number=place,
            features=[name],
            description=[text],
        )
        media = fields(
            price=prices[place % 4],
            images=[image],
            videos={"title": [], "url": [], "user_id": []},
            store=name,
        )
        details = {"Brand": name, "Package Dimensions": f"9 x 6 x {place % 9} inches"}
        categories = fields(categories=["Books", name], details=details)
        scores.append(f'{numbers}, {media}, {categories}, "parent_asin": "')
    scores = pool(scores)

    def metadata(rng: np.random.Generator, items: np.ndarray, variants: np.ndarray) -> Columns:
        score = pick(scores, rng.integers(len(scores), size=len(items)))
        title = pieces.columns(items, variants, quoted, '"title": "', '", ')
        return [
            b'{"main_category": "Books", ',
            *title,
            score,
            asins(items, num_items),
            b'", "bought_together": null}\n',
        ]

    return metadata


def amazon_2023(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return reviews and metadata of the 2023 release.

    Half of the reviews name another item in `asin` than in `parent_asin`.
    """
    words = make_words(rng)
    pieces = make_titles(rng, words)
    summaries, bodies = texts(rng, words, BODIES, 3, 0.6, 20), texts(rng, words, BODIES, 20, 1.15)
    bodies = pool(
        [
            f'{{"rating": {1 + place % 5}.0, "title": "{quoted(title)}", "text": "{quoted(text)}", '
            '"images": [], "asin": "'
            for place, (title, text) in enumerate(zip(summaries, bodies, strict=True))
        ]
    )
    ends = pool(
        [
            f', "helpful_vote": {votes}, "verified_purchase": {bought}}}\n'
            for votes in (0, 0, 0, 1, 7)
            for bought in ("true", "false")
        ]
    )

    def reviews(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        body, end = (rng.integers(len(part), size=len(users)) for part in (bodies, ends))
        variant = asins(
            np.where(rng.random(len(items)) < 0.5, items, draw.num_items - 1 - items),
            draw.num_items,
        )
        parent, user = asins(items, draw.num_items), codes(users, BASE32, 26)
        middle = [
            b'", "parent_asin": "',
            parent,
            b'", "user_id": "AE',
            *user,
            b'", "timestamp": ',
            milliseconds(users, days),
        ]
        return [pick(bodies, body), variant, *middle, pick(ends, end)]

    return two_parts(draw, reviews, metadata_2023(rng, words, pieces, draw.num_items))


def milliseconds(users: np.ndarray, days: np.ndarray) -> pa.Array:
    """Spell a user's times in milliseconds."""
    return decimal(days.astype(np.int64) * 86_400_000 + mix(users, 3, 86_400_000))


def amazon_2023_csv(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return the ratings of the 2023 release's benchmark, and its metadata."""
    words = make_words(rng)
    metadata = metadata_2023(rng, words, make_titles(rng, words), draw.num_items)
    stars = pool([f",{number}.0," for number in range(1, 6)])

    def ratings(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        rating, parent = (
            pick(stars, rng.integers(len(stars), size=len(users))),
            asins(items, draw.num_items),
        )
        return [
            b"AE",
            *codes(users, BASE32, 26),
            b",",
            parent,
            rating,
            milliseconds(users, days),
            b"\n",
        ]

    return two_parts(draw, ratings, metadata)


def steam(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return reviews and games as Python 2 printed them: dict lines with u'' strings."""
    words = make_words(rng)
    pieces = make_titles(rng, words, clean=True)
    names = pool(
        [f"{{u'username': u'{python_quoted(name)}" for name in texts(rng, words, 4_096, 2, 0.3, 3)]
    )
    played = pool(
        [
            f"', u'hours': {hours / 10}, u'products': {hours % 900}, u'product_id': u'"
            for hours in rng.geometric(0.002, 4_096)
        ]
    )
    dates = day_pool(
        lambda day: f"', u'page_order': {day % 10}, u'date': u'{date_of(day)}', u'text': u"
    )
    bodies = pool(
        [
            f"{ascii(text)}, u'early_access': {n % 9 == 0}, u'page': {n % 99}}}\n"
            for n, text in enumerate(texts(rng, words, BODIES, 15, 1.2))
        ]
    )

    def reviews(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        hours, body = (
            pick(part, rng.integers(len(part), size=len(users))) for part in (played, bodies)
        )
        user = [pick(names, mix(users, 4, len(names))), digits(users, UPPER, 6)]
        return [*user, hours, decimal(items + 100_000), pick(dates, days - FIRST_DAY), body]

    studios = [python_quoted(name) for name in texts(rng, words, 4_096, 2, 0.3, 3)]
    fronts = pool(
        [
            f"{{u'publisher': u'{name}', u'genres': [u'Action', u'Indie'], u'app_name': u'{name}', "
            for name in studios
        ]
    )
    ends = pool([f"', u'developer': u'{name}'}}\n" for name in studios])
    prices = pool(
        [
            "u'price': u'Free to Play'",
            *(f"u'price': {cents / 100}" for cents in range(99, 6_000, 50)),
        ]
    )

    def metadata(rng: np.random.Generator, items: np.ndarray, variants: np.ndarray) -> Columns:
        front, price, end = (
            pick(part, rng.integers(len(part), size=len(items))) for part in (fronts, prices, ends)
        )
        game = decimal(items + 100_000)
        title = pieces.columns(items, variants, python_quoted, "u'title': u'", "', ")
        url = [
            b"u'url': u'http://store.steampowered.com/app/",
            game,
            b"/', u'release_date': u'2016-04-01', u'tags': [u'Indie', u'RPG'], ",
        ]
        lists = [
            b"u'reviews_url': u'http://steamcommunity.com/app/",
            game,
            b"/reviews/', u'specs': [u'Single-player'], ",
        ]

        return [
            front,
            *title,
            *url,
            b"u'discount_price': 4.49, ",
            *lists,
            price,
            b", u'early_access': False, u'id': u'",
            game,
            end,
        ]

    return two_parts(draw, reviews, metadata)


def yelp(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return reviews and businesses of the academic data set."""
    words = make_words(rng)
    pieces = make_titles(rng, words, clean=True)
    bodies = texts(rng, words, BODIES, 60, 0.9)
    stars = [
        fields(stars=n % 5 + 1.0, useful=n % 7, funny=n % 2, cool=n % 3, text=text)
        for n, text in enumerate(bodies)
    ]
    stars = pool([f'", {piece}, "date": "' for piece in stars])
    dates = day_pool(lambda day: f"{date_of(day)} ")
    clock = pool([f'{n // 60:02}:{n % 60:02}:{n % 59:02}"}}\n' for n in range(1_440)])

    def reviews(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        review = codes(rng.integers(2**33, size=len(users)), BASE64, 22)
        ids = [
            b'{"review_id": "',
            *review,
            b'", "user_id": "',
            *codes(users, BASE64, 22),
            b'", "business_id": "',
            *codes(items, BASE64, 22),
        ]
        body, minute = (
            pick(part, rng.integers(len(part), size=len(users))) for part in (stars, clock)
        )
        return [*ids, body, pick(dates, days - FIRST_DAY), minute]

    attributes = {
        "ByAppointmentOnly": "True",
        "BusinessParking": "{'garage': False, 'street': True}",
    }
    hours = {"Monday": "8:0-18:30", "Tuesday": "8:0-18:30"}
    places = []
    for n, city in enumerate(texts(rng, words, 4_096, 2, 0.3, 3)):
        place = fields(
            address=f"{n} Main St",
            city=city,
            state="PA",
            postal_code=f"{n:05}",
            latitude=30 + n / 1e3,
        )
        state = fields(
            longitude=-90 - n / 1e3,
            stars=1 + n % 9 / 2,
            review_count=n,
            is_open=n % 2,
            attributes=attributes,
        )
        places.append(
            f"{place}, {state}, {fields(categories=f'Restaurants, {city}', hours=hours)}}}\n"
        )
    places = pool(places)

    def metadata(rng: np.random.Generator, items: np.ndarray, variants: np.ndarray) -> Columns:
        place = pick(places, rng.integers(len(places), size=len(items)))
        name = pieces.columns(items, variants, quoted, '"name": "', '", ')
        return [b'{"business_id": "', *codes(items, BASE64, 22), b'", ', *name, place]

    return two_parts(draw, reviews, metadata)


def decimal(numbers: np.ndarray) -> pa.Array:
    """Spell integers as decimal text."""
    return pc.cast(pc.cast(pa.array(numbers), pa.string()), pa.binary())


def delimited(
    rng: np.random.Generator, draw: Draw, mark: str, title_mark: str, genre_mark: str, time_end: str
) -> list[Part]:
    """Return delimited ratings (user, item, rating, seconds) and items (item, title, genres)."""
    pieces = make_titles(rng, make_words(rng), clean=True)
    words = GENRES.split()
    genres = pool(
        [genre_mark.join(rng.choice(words, 1 + n % 3, replace=False)) for n in range(512)]
    )
    between = mark.encode()
    has_halves = "." in time_end or mark == ","
    stars = [half / 2 if has_halves else half // 2 for half in range(2, 11)]
    stars = pool([f"{mark}{number}{mark}" for number in stars])

    def reviews(
        rng: np.random.Generator, users: np.ndarray, items: np.ndarray, days: np.ndarray
    ) -> Columns:
        rating = pick(stars, rng.integers(len(stars), size=len(users)))
        return [
            decimal(users + 1),
            between,
            decimal(items + 1),
            rating,
            decimal(days * np.int64(86_400) + mix(users, 3, 86_400)),
            time_end.encode(),
        ]

    def escape(text: str) -> str:
        text = (
            text.encode("latin-1", "ignore").decode("latin-1").replace(":", " ").replace("\t", " ")
        )
        return text.replace('"', '""' if title_mark else "'")

    def metadata(rng: np.random.Generator, items: np.ndarray, variants: np.ndarray) -> Columns:
        kind = pick(genres, rng.integers(len(genres), size=len(items)))
        title = pieces.columns(items, variants * 0, escape, title_mark, f" (1999){title_mark}")
        return [decimal(items + 1), between, *title, between, kind, b"\n"]

    return two_parts(draw, reviews, metadata)


def histories(draw: Draw) -> tuple[Draw, np.ndarray]:
    """Return the reviews by user, then day, and where the reviews of each user start.

    The starts are int64 (U + 1,), with the end as the last one.
    """
    visits = draw.ordered(draw.days, draw.users)
    return visits, np.flatnonzero(np.diff(visits.users, prepend=-1, append=-1))


def lists(
    pieces: pa.Array, items: np.ndarray, starts: np.ndarray, ends: np.ndarray, mark: bytes
) -> pa.Array:
    """Join, per line, the pieces of items[start:end] with a mark."""
    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
    return pc.binary_join(
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pick(pieces, items[places])), mark
    )


def spell(columns: Columns) -> pa.Array:
    """Join columns to one."""
    return pc.binary_join_element_wise(
        *(pa.scalar(part) if isinstance(part, bytes) else part for part in columns), pa.scalar(b"")
    )


def semantic_ids(items: np.ndarray, letters: str, mark: bytes = b'", "') -> Columns:
    """Return columns that spell a unique semantic ID: codes like <a_236>, with marks between.

    There is one code per letter.
    """
    numbers = items.astype(np.uint64) * np.uint64(0x9E3779B1) % np.uint64(256 ** len(letters))
    columns: Columns = []
    for place, letter in enumerate(letters):
        code = (numbers >> np.uint64(8 * (len(letters) - 1 - place))) % np.uint64(256)
        columns += [mark, pick(pool([f"<{letter}_{number}>" for number in range(256)]), code)]
    return columns[1:]


def d3_csv(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return rows of MiniOneRec's form, split by time, of all reviews but each user's first.

    The titles have about 80 characters.
    """
    visits, bounds = histories(draw)
    pieces = make_titles(rng, make_words(rng), clean=True, tail_words=14)
    catalogue = np.arange(draw.num_items)

    def titles(escape: Callable[[str], str]) -> pa.Array:
        return spell(pieces.columns(catalogue, 0 * catalogue, escape, "", ""))

    listed, quoted_titles = (
        titles(lambda text: python_quoted(text).replace('"', '""')),
        titles(lambda text: text.replace('"', '""')),
    )
    numbers, codes = decimal(catalogue), spell(semantic_ids(catalogue, "abc", b""))

    def rows(rng: np.random.Generator, targets: np.ndarray, starts: np.ndarray) -> Columns:
        past, apart = (visits.items, starts, targets), b"', '"
        item = visits.items[targets]
        title = [
            b",\"['",
            lists(listed, *past, apart),
            b'\']","',
            pick(quoted_titles, item),
            b'","[',
        ]
        ids = [
            lists(numbers, *past, b", "),
            b']",',
            pick(numbers, item),
            b",\"['",
            lists(codes, *past, apart),
            b"']\",",
        ]
        return [b"A", decimal(visits.users[targets]), *title, *ids, pick(codes, item), b"\n"]

    firsts = np.repeat(bounds[:-1], np.diff(bounds))
    places = np.arange(len(firsts))
    targets = places[places > firsts]
    targets = targets[np.argsort(visits.days[targets], kind="stable")]
    starts = np.maximum(firsts[targets], targets - D3_HISTORY)
    splits = [len(targets) * tenths // 10 for tenths in (0, 8, 9, 10)]
    parts = [Part((targets[start:end], starts[start:end]), rows) for start, end in pairwise(splits)]
    names = titles(str)
    info = Part(
        (catalogue,),
        lambda rng, items: [
            pick(codes, items),
            b"\t",
            pick(names, items),
            b"\t",
            decimal(items),
            b"\n",
        ],
    )
    return [*parts, info]


def users_part(draw: Draw, fronts: tuple[bytes, bytes], mark: bytes, ends: tuple[str, str]) -> Part:
    """Return a part with a line per user: front, user, front, items with marks between, end.

    The last line has another end.
    """
    visits, bounds = histories(draw)
    numbers = decimal(np.arange(draw.num_items))

    def lines(
        rng: np.random.Generator, users: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> Columns:
        end = pick(pool(ends), (stops == bounds[-1]).astype(int))
        return [
            fronts[0],
            decimal(users),
            fronts[1],
            lists(numbers, visits.items, starts, stops, mark),
            end,
        ]

    return Part((visits.users[bounds[:-1]], bounds[:-1], bounds[1:]), lines)


def lcrec_json(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return two JSON objects as published: users with items (indented), items with codes."""
    inter = users_part(
        draw, (b'\n    "', b'": [\n        '), b",\n        ", ("\n    ],", "\n    ]\n}")
    )
    ends = pool(['"], ', '"]}'])

    def index(rng: np.random.Generator, items: np.ndarray) -> Columns:
        end = pick(ends, (items == draw.num_items - 1).astype(int))
        return [b'"', decimal(items), b'": ["', *semantic_ids(items, "abcd"), end]

    return [inter, Part((np.arange(draw.num_items),), index)]


def sequences(rng: np.random.Generator, draw: Draw) -> list[Part]:
    """Return users with items and a catalogue with titles and codes, as JSON lines."""
    users = users_part(draw, (b'{"user_id": ', b', "items": ['), b", ", ("]}\n", "]}\n"))
    pieces = make_titles(rng, make_words(rng), clean=True)

    def catalogue(rng: np.random.Generator, items: np.ndarray) -> Columns:
        title = pieces.columns(items, 0 * items, quoted, ', "title": "', '", "semantic_id": ["')
        return [b'{"item_id": ', decimal(items), *title, *semantic_ids(items, "abc"), b'"]}\n']

    return [users, Part((np.arange(draw.num_items),), catalogue)]


@dataclass(frozen=True)
class Form:
    """One published form."""

    parts: Callable[[np.random.Generator, Draw], list[Part]]
    """Makes the parts, one per file."""
    files: tuple[str, ...]
    headers: tuple[str, ...] = ()
    encoding: str = "utf-8"
    by_user: bool = False
    """Whether the reviews of a user stand together."""


FORMS = {
    "amazon-2014": Form(amazon_2014, ("reviews_Books.json", "meta_Books.json")),
    "amazon-2018": Form(amazon_2018, ("Books.json", "meta_Books.json")),
    "amazon-2023": Form(amazon_2023, ("Books.jsonl", "meta_Books.jsonl")),
    "amazon-2023-csv": Form(
        amazon_2023_csv,
        ("Books.csv", "meta_Books.jsonl"),
        ("user_id,parent_asin,rating,timestamp\n",),
        by_user=True,
    ),
    "steam": Form(steam, ("steam_reviews.json", "steam_games.json")),
    "yelp": Form(
        yelp, ("yelp_academic_dataset_review.json", "yelp_academic_dataset_business.json")
    ),
    "movielens-1m": Form(
        partial(delimited, mark="::", title_mark="", genre_mark="|", time_end="\n"),
        ("ratings.dat", "movies.dat"),
        encoding="latin-1",
        by_user=True,
    ),
    "movielens-25m": Form(
        partial(delimited, mark=",", title_mark='"', genre_mark="|", time_end="\n"),
        ("ratings.csv", "movies.csv"),
        ("userId,movieId,rating,timestamp\n", "movieId,title,genres\n"),
        by_user=True,
    ),
    "recbole": Form(
        partial(delimited, mark="\t", title_mark="", genre_mark=" ", time_end=".0\n"),
        ("books.inter", "books.item"),
        (
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n",
            "item_id:token\ttitle:token_seq\tgenre:token_seq\n",
        ),
    ),
    "d3-csv": Form(d3_csv, ("train.csv", "valid.csv", "test.csv", "info.txt"), (D3_HEADER,) * 3),
    "lcrec-json": Form(lcrec_json, ("Books.inter.json", "Books.index.json"), ("{", "{")),
    "sequences": Form(sequences, ("sequences.jsonl", "items.jsonl")),
}


# ---- writing


def join(columns: Columns) -> memoryview:
    """Join columns into the bytes of all lines."""
    lines = spell(columns)
    first, last = np.frombuffer(lines.buffers()[1], dtype=np.int32)[
        [lines.offset, lines.offset + len(lines)]
    ]
    return memoryview(lines.buffers()[2])[first:last]


def write(
    path: Path, header: bytes, make: Callable[[int, slice], memoryview], size: int, compress: bool
) -> None:
    """Write batches of lines in order, with two threads.

    Gzip files have one member at level 1, which is one stream of many blocks.
    """
    slices = [slice(start, min(start + BATCH, size)) for start in range(0, size, BATCH)]

    def render(number: int) -> tuple[memoryview | bytes, memoryview | bytes]:
        text = make(number, slices[number])
        text = header + bytes(text) if number == 0 and header else text
        if not compress:
            return text, text
        deflate = zlib.compressobj(1, wbits=-15)
        return text, deflate.compress(text) + deflate.flush(zlib.Z_FULL_FLUSH)

    checksum = length = 0
    with ThreadPoolExecutor(THREADS) as threads, open(path, "wb") as file:
        file.write(b"\x1f\x8b\x08\0\0\0\0\0\x04\xff" if compress else b"")
        for text, packed in ahead(threads, render, len(slices)):
            if compress:
                checksum, length = zlib.crc32(text, checksum), length + len(text)
            file.write(packed)
        if compress:
            file.write(b"\x03\0" + struct.pack("<II", checksum, length % 2**32))


def ahead(threads: ThreadPoolExecutor, work: Callable[[int], Any], number: int) -> Iterator[Any]:
    """Yield work(0), work(1) …, computed by threads, few at a time so that memory is bounded."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    for index in range(number):
        waiting.append(threads.submit(work, index))
        if len(waiting) > THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def make_files(
    form_name: str, num_reviews: int, folder: Path, compress: bool = False
) -> list[Path]:
    """Write the files of a form; return their paths."""
    form, interactions = FORMS[form_name], draw(num_reviews)
    if form.by_user:
        interactions = interactions.ordered(interactions.users)
    parts = form.parts(np.random.default_rng(SEED), interactions)
    paths = [folder / (name + ".gz" * compress) for name in form.files]
    for place, (path, part, header) in enumerate(
        zip_longest(paths, parts, form.headers, fillvalue="")
    ):

        def text(
            number: int, rows: slice, place: int = place, part: Part = part
        ) -> memoryview | bytes:
            rng = np.random.default_rng([SEED, number, place])
            lines = join(part.lines(rng, *(column[rows] for column in part.about)))
            return (
                lines
                if form.encoding == "utf-8"
                else bytes(lines).decode("utf-8").encode(form.encoding)
            )

        write(path, header.encode(), text, len(part.about[0]), compress)
    return paths


def main() -> None:
    """Write the files of one form; print a JSON object with their paths as the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("reviews", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gz", action="store_true", help="write gzip files, level 1")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    paths = make_files(args.form, args.reviews, args.folder, args.gz)
    print(json.dumps({"paths": list(map(str, paths))}))


if __name__ == "__main__":
    main()
