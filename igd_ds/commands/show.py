"""Show items as a model reads them: tokens, each with its gain as a bar, and shared prefixes.

    igd show --dataset DATASET --tokenizer PATH "Super Mario" 4711 [--worst N] [--json]
        [--item_kind text|semantic-id] [--entropy prior|conditional] [--limit N]
        [--ids source|dense]

An item is named by the source's id, its title, or a part of its title; the tokenizer may be a
RUN/model. The bars are those of IGD Figure 1. 41× means 41 training rows. --worst N lists the items
that are hardest to tell apart: those whose last deciding token comes latest, those that are a
prefix of other items, and those with equal token paths.
"""

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from igd_ds import distributed
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.commands.catalogue_flags import add_catalogue_flags
from igd_ds.config.options import FlagParser
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.items.ids import SOURCE, SPACES, ItemIds
from igd_ds.items.view import MOST_TRAINED, CatalogueView, describe, find, visible, worst

TOKEN_WIDTH, BAR_WIDTH, NAME_WIDTH = 18, 24, 60  # columns of the terminal
EIGHTHS = " ▏▎▍▌▋▊▉"
BOLD, DIM, BAR = "1", "2", "36"

Described = Mapping[str, Any]
"""JSON values that `igd_ds/items/view.py` returns."""
Paint = Callable[[str, str], str]
"""Takes a text and an ANSI code and returns the text in that style."""


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes.

    Wide characters take two columns, combining characters none.

    Example:
        >>> columns("日本x")
        5
    """
    return sum(
        1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
        if unicodedata.category(character) not in ("Mn", "Me", "Cf")
    )


def fit(text: str, width: int) -> str:
    """Return the text in exactly `width` columns: padded, or cut off with an ellipsis."""
    if columns(text) > width:
        while columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text))


def bar(value: float, largest: float) -> str:
    """Return a bar of at most BAR_WIDTH columns, in eighths of a column.

    It is hatched if `value` is negative.
    """
    eighths = round(8 * BAR_WIDTH * abs(value) / largest) if largest else 0
    drawn = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
    return drawn if value >= 0 else "░" * len(drawn)


def painter(stream: TextIO) -> Paint:
    """Return a function that styles a text if `stream` is a terminal and NO_COLOR is not set."""
    colourful = (
        stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    return lambda text, code: f"\033[{code}m{text}\033[0m" if colourful and text else text


def named(item: Described) -> str:
    """Return an item on one line."""
    name = fit(visible(item["name"]), NAME_WIDTH).rstrip()
    return f"[{item['source_id']}] {name} ({item['train_count']}×)"


def plural(count: int, noun: str) -> str:
    """Return a number and a noun.

    Example:
        >>> plural(2, "item")
        '2 items'
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def text_of(tokens: Sequence[Described]) -> str:
    """Return the text of consecutive tokens."""
    return "".join(token["text"] for token in tokens).replace("␣", " ")


def and_more(shown: Sequence[str], total: int) -> str:
    """Join the shown texts and add how many of `total` are not shown."""
    rest = f" · {total - len(shown)} more" if total > len(shown) else ""
    return " · ".join(shown) + rest


def print_item(item: Described, paint: Paint) -> None:
    """Print a description that `describe` made; consecutive forced tokens share a line."""
    tokens: Sequence[Described] = item["tokens"]
    print(paint(f"item {item['source_id']}: {visible(item['name'])}", BOLD))
    rows = plural(item["train_count"], "training row")
    print(f"  {rows}, {len(tokens)} tokens, {item['gain']:.3f} nats")
    heading = fit("token", TOKEN_WIDTH + BAR_WIDTH + 1)
    print(f"         {heading} {'nats':>7} {'share':>6} {'items':>8} {'training':>9}")

    largest = max(abs(token["gain"]) for token in tokens)
    last_of = dict(item["forced_runs"])
    number = 1
    while number <= len(tokens):
        token, last = tokens[number - 1], last_of.get(number, number)
        if token["forced"]:
            print_forced(tokens, number, last, paint)
        else:
            print_token(token, number, largest, paint)
        number = last + 1

    same_path = item["same_path"]
    if same_path["items"]:
        others = and_more(list(map(named, same_path["most_trained"])), same_path["items"])
        print(f"  the same tokens: {others}")
    for part in item["parting"]:
        others = and_more(list(map(named, part["most_trained"])), part["items"])
        print(f"  {text_of(tokens[: part['tokens']])}… is shared with {others}")
    print()


def print_forced(tokens: Sequence[Described], first: int, last: int, paint: Paint) -> None:
    """Print the forced tokens with numbers `first` … `last`, counted from 1 on, on one line."""
    token = tokens[first - 1]
    text = fit(text_of(tokens[first - 1 : last]), TOKEN_WIDTH + BAR_WIDTH + 1)
    numbers = f"{first}-{last}" if last > first else str(first)
    counts = f"{token['items']:>8} {token['train_count']:>9}"
    print(paint(f"  {numbers:>6} {text} {'forced':>14} {counts}", DIM))


def print_token(token: Described, number: int, largest: float, paint: Paint) -> None:
    """Print a token with its bar, and its siblings on a second line."""
    drawn = fit(bar(token["gain"], largest), BAR_WIDTH)
    share = f"{token['share']:.1%}" if token["share"] is not None else ""
    numbers = f"{token['gain']:7.3f} {share:>6} {token['items']:>8} {token['train_count']:>9}"
    if token["zero_gain"]:
        numbers += "  zero gain"
    print(f"  {number:>6} {fit(token['text'], TOKEN_WIDTH)} {paint(drawn, BAR)} {numbers}")

    others = [
        f"{other['text']} ({plural(other['items'], 'item')}, {other['train_count']}×, "
        f"{other['gain']:.3f})"
        for other in token["most_trained_siblings"]
    ]
    print(paint(f"         or {and_more(others, token['siblings'])}", DIM))


def print_worst(found: Described, paint: Paint) -> None:
    """Print the items that `worst` found."""
    prefixes = f"ending where others go on: {plural(found['prefix_items'], 'item')}"
    for key, title in (("latest", "told apart latest"), ("prefixes", prefixes)):
        print(paint(title, BOLD))
        for item in found[key]:
            print(
                f"  token {item['deciding']:>3} of {item['tokens']:>3} decides, "
                f"{item['gain']:7.3f} nats  {named(item)}"
            )

    print(paint(f"equal token paths: {found['duplicate_paths']}", BOLD))
    for items in found["duplicates"]:
        print(f"  {and_more(list(map(named, items[:MOST_TRAINED])), len(items))}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: there is nothing to show, or a number of items is out of its range.
    """
    parser = FlagParser(
        prog="igd show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="*", metavar="ITEM", help="id, title or part of a title")
    add_catalogue_flags(parser)
    parser.add_argument(
        "--worst",
        type=int,
        default=0,
        metavar="N",
        help="list the N items of each kind that are hardest to tell apart (default: 0)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=3,
        metavar="N",
        help="show at most N of the items that an ITEM names (default: 3)",
    )
    parser.add_argument(
        "--ids",
        choices=SPACES,
        default=SOURCE,
        help="ids that name an ITEM: the source's, or dense item ids of the dataset folder "
        f"(default: {SOURCE})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")

    args = parser.parse_args(argv)
    if not args.items and not args.worst:
        raise UsageError(
            "nothing to show: name an item (id, title or part of it), or give --worst N"
        )
    if args.worst < 0 or args.limit < 1:
        raise UsageError(
            f"--worst {args.worst} must be at least 0, and --limit {args.limit} at least 1"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: see `parse`; there is no such dataset, tokenizer or item, or they do not fit.
    """
    args = parse(argv)
    dataset = InteractionDataset.load(args.dataset)
    tokenizer = load_tokenizer(args.tokenizer)
    ids = ItemIds.read(args.dataset)
    view = CatalogueView.build(dataset, tokenizer, args.item_kind, args.entropy, ids)

    # An item that several arguments name is shown once.
    matches = {wanted: find(view, wanted, args.ids) for wanted in args.items}
    chosen = dict.fromkeys(item for found in matches.values() for item in found[: args.limit])
    described = [describe(view, item) for item in chosen]
    least = worst(view, args.worst) if args.worst else None

    if args.json:
        print(json.dumps({"entropy": args.entropy, "items": described, "worst": least}))
        return 0

    paint = painter(sys.stdout)
    for item in described:
        print_item(item, paint)
    for wanted, found in matches.items():
        if rest := found[args.limit :]:
            others = [named(view.item(item)) for item in rest[: 2 * args.limit]]
            print(f"{len(found)} items match {wanted!r}; also: {and_more(others, len(rest))}\n")
    if least:
        print_worst(least, paint)
    return 0


if __name__ == "__main__":
    distributed.run(main)
