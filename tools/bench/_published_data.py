"""D3's published preprocessing of Amazon 2018, written plainly, for tools/bench/data.py.

Reviews and metadata are lists of dicts from `json.loads`. Users, items and titles are kept in
Python dicts. Every pass of the 5-core and every start of the window walks all reviews again. Rows
are sorted lists, which are written as CSV. The rules:

* An item needs a title without `<span id`. In the title, `&quot;` and `&amp;` are replaced, and
  spaces, then quotes are stripped. It must then have at least 2 characters and at most 20 words by
  split(" "). One metadata line that fails removes the item, whatever the others say. Of several
  good titles the first one counts, as on our side (the published script lets the last one win).
* Both ends of the window are included. While fewer than `min_items` items are left, the start moves
  back by a calendar year, until 1996, and everything starts again.
* There is a row per interaction from a user's second on. Users are ordered by time, and equal times
  by their position in the file. So are the rows.
"""

import csv
import datetime
import json
from collections.abc import Sequence
from pathlib import Path

SPLITS = ("train", "valid", "test")
K, MAX_HISTORY, MAX_WORDS = 5, 10, 20
FIRST_YEAR = 1996
HEADER = [
    "user_id",
    "item_asins",
    "item_asin",
    "history_item_id",
    "item_id",
    "history_item_title",
    "item_title",
]
HEADER += ["history_rating", "rating", "history_timestamp", "timestamp"]
Row = tuple[str, list[dict], dict]
"""User, the reviews before, and the review."""


def read_lines(path: Path) -> list[dict]:
    """Parse every line of a file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def usable_titles(metadata: list[dict]) -> dict[str, str]:
    """Return the clean title of every item that may stay."""
    titles, removed = {}, set()
    for entry in metadata:
        if "title" not in entry or "<span id" in entry["title"]:
            removed.add(entry["asin"])
            continue
        title = entry["title"].replace("&quot;", '"').replace("&amp;", "&").strip(" ").strip('"')
        if len(title) > 1 and len(title.split(" ")) <= MAX_WORDS:
            titles.setdefault(entry["asin"], title)
        else:
            removed.add(entry["asin"])
    return {asin: title for asin, title in titles.items() if asin not in removed}


def five_core(
    reviews: list[dict], titles: dict[str, str], start: int, end: int, min_items: int
) -> tuple[list[dict], int]:
    """Walk all reviews until no user and no item is removed, or fewer than `min_items` are left.

    Returns:
        The reviews that are left, and the number of their items.
    """
    removed_users, removed_items = set(), set()
    while True:
        kept, users, items = [], {}, {}
        for review in reviews:
            if int(review["unixReviewTime"]) < start or int(review["unixReviewTime"]) > end:
                continue
            user, item = review["reviewerID"], review["asin"]
            if item not in titles or user in removed_users or item in removed_items:
                continue
            users[user] = users.get(user, 0) + 1
            items[item] = items.get(item, 0) + 1
            kept.append(review)

        short_users = [user for user, count in users.items() if count < K]
        short_items = [item for item, count in items.items() if count < K]
        removed_users.update(short_users)
        removed_items.update(short_items)
        if len(items) < min_items or not short_users and not short_items:
            return kept, len(items)


def seconds(date: datetime.date) -> int:
    """Return midnight UTC in seconds since 1970."""
    return int(
        datetime.datetime(date.year, date.month, date.day, tzinfo=datetime.timezone.utc).timestamp()
    )


def make_rows(reviews: list[dict]) -> dict[str, list[Row]]:
    """Return the rows of each split."""
    by_user = {}
    for position, review in enumerate(reviews):
        by_user.setdefault(review["reviewerID"], []).append(
            (int(review["unixReviewTime"]), position, review)
        )
    rows = []
    for user, visits in by_user.items():
        visits.sort(key=lambda visit: visit[:2])
        for place in range(1, len(visits)):
            time, position, target = visits[place]
            before = [review for _, _, review in visits[max(place - MAX_HISTORY, 0) : place]]
            rows.append((time, position, (user, before, target)))

    rows.sort(key=lambda row: row[:2])
    ordered = [row for _, _, row in rows]
    train, valid = len(ordered) * 8 // 10, len(ordered) * 9 // 10
    return {"train": ordered[:train], "valid": ordered[train:valid], "test": ordered[valid:]}


def write_csv(
    path: Path, rows: list[Row], titles: dict[str, str], item_ids: dict[str, int]
) -> None:
    """Write a split as the published script does: lists as Python text."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for user, before, target in rows:
            past, asin = [review["asin"] for review in before], target["asin"]
            ids, names = [item_ids[item] for item in past], [titles[item] for item in past]
            ratings, times = (
                [int(review[key]) for review in before] for key in ("overall", "unixReviewTime")
            )
            rating, time = int(target["overall"]), int(target["unixReviewTime"])
            items = [past, asin, ids, item_ids[asin], names, titles[asin]]
            writer.writerow([user, *items, ratings, rating, times, time])


def preprocess(
    inputs: Sequence[Path],
    output: Path,
    start: datetime.date,
    end: datetime.date,
    min_items: int = 10_000,
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Make the CSV files of a review and a metadata file; return (rows by split, titles)."""
    reviews, metadata = map(read_lines, inputs)
    while True:
        titles = usable_titles(metadata)
        kept, num_items = five_core(reviews, titles, seconds(start), seconds(end), min_items)
        if num_items >= min_items or start.year <= FIRST_YEAR:
            break
        start = start.replace(year=start.year - 1)

    item_ids = {}
    for review in kept:
        item_ids.setdefault(review["asin"], len(item_ids))
    rows = make_rows(kept)

    output.mkdir(parents=True, exist_ok=True)
    with open(output / "info.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{titles[asin]}\t{number}\n" for asin, number in item_ids.items())
    for split in SPLITS:
        write_csv(output / f"{split}.csv", rows[split], titles, item_ids)
    return rows, titles
