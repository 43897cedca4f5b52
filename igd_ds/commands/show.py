"""Show items of a catalogue as a model reads them: tokens, their gain as bars (IGD Figure 1), and what shares their prefixes.

    igd show --dataset DATASET --tokenizer PATH "Super Mario" 4711 [--worst N] [--item_kind text|semantic-id]
        [--entropy prior|conditional] [--limit N] [--json]

An item is named by its id, its title, or part of it; the tokenizer may be a RUN/model. `--worst N` lists what is hardest to tell
apart: items whose last deciding token comes latest, items that end where others go on, and equal paths. 41× is 41 training rows.
"""

import argparse
import difflib
import json
import os
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np

from igd_ds import distributed
from igd_ds.backbones.causal_lm import load_tokenizer
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.items.catalogue import KINDS, Catalogue
from igd_ds.items.decisiveness import ENTROPIES, information_gain
from igd_ds.items.trie import TokenTrie

SHOWN = 3  # siblings of a token, and items that part at one
TOKEN_WIDTH, BAR_WIDTH, NAME_WIDTH = 18, 24, 60  # columns of the terminal
EIGHTHS = " ▏▎▍▌▋▊▉"
BOLD, DIM, BAR = "1", "2", "36"


@dataclass(frozen=True)
class Shelf:
    """A catalogue ready to be looked at: `names` are each item's title, semantic ID or both, `gain` (M,) is in nats."""

    catalogue: Catalogue
    trie: TokenTrie
    gain: np.ndarray
    tokenizer: object
    names: list[list[str]]

    @classmethod
    def build(cls, dataset, tokenizer, kind: str | None, entropy: str) -> "Shelf":
        """Tokenize a dataset's items as training does; see `Catalogue.build` for `kind` and what it raises."""
        catalogue = Catalogue.build(dataset, tokenizer, kind)
        trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
        codes = (
            dataset.semantic_ids if catalogue.kind == "semantic-id" else [[]] * dataset.num_items
        )
        names = [
            [name for name in (title, "".join(path)) if name]
            for title, path in zip(dataset.titles, codes, strict=True)
        ]
        return cls(catalogue, trie, information_gain(trie, entropy), tokenizer, names)

    def text(self, token: int) -> str:
        """Return a token with leading space and line breaks visible; part of a character as the tokenizer spells it."""
        text = self.tokenizer.decode([token])
        text = self.tokenizer.convert_ids_to_tokens(int(token)) if "\ufffd" in text else text
        return visible("␣" + text[1:] if text.startswith(" ") else text)

    def item(self, item: int) -> dict:
        """Return what is said of any item: its id, name and training rows."""
        return {
            "item": int(item),
            "name": " ".join(self.names[item]),
            "train_count": int(self.catalogue.counts[item]),
        }

    def some(self, items: np.ndarray) -> list[dict]:
        """Return the first SHOWN of `items`, those trained most often first."""
        first = np.lexsort((items, -self.catalogue.counts[items]))[:SHOWN]
        return [self.item(item) for item in items[first]]


def find(shelf: Shelf, wanted: str) -> list[int]:
    """Return the items that `wanted` names, those trained most often first: by id or exact name, else by part of the name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    names, sought = shelf.names, wanted.strip().casefold()
    found = [
        item
        for item, mine in enumerate(names)
        if sought == str(item) or sought in map(str.casefold, mine)
    ]
    if not found and sought:
        found = [
            item
            for item, mine in enumerate(names)
            if any(sought in name.casefold() for name in mine)
        ]
    if not found:
        original = {name.casefold(): name for mine in names for name in mine}
        near = [
            repr(original[name]) for name in difflib.get_close_matches(sought, original, cutoff=0.3)
        ]
        raise UsageError(
            f"no item {wanted!r} among {len(names)}; nearest: {', '.join(near) or 'none'}"
        )
    return sorted(found, key=lambda item: (-shelf.catalogue.counts[item], item))


def describe(shelf: Shelf, item: int) -> dict:
    """Return an item's tokens with gain, counts and siblings, its runs of forced tokens, and who shares its prefixes.

    A token's `items` and `train_count` are those under the prefix that ends with it; `forced`: the prefix before it has no other
    continuation; `zero_gain`: it drops no training row. `share` is its part of the item's whole gain, None if that is 0.
    `deciding` is the number of the last token that is not forced, from 1 on, None if all are; `parting` has the prefixes behind
    which other items part, by their number of tokens, the longest first.
    """
    trie, node = shelf.trie, int(shelf.trie.leaf_of_item[item])
    nodes = []
    while node:
        nodes.insert(0, node)
        node = int(trie.parent[node])
    gain, total = shelf.gain[nodes], float(shelf.gain[nodes].sum())
    tokens, parting = [], []
    for number, node in enumerate(nodes):
        parent = int(trie.parent[node])
        siblings = np.setdiff1d(
            np.arange(trie.child_begin[parent], trie.child_begin[parent + 1]), [node]
        )
        most_trained = siblings[
            np.lexsort((siblings, -trie.train_count[siblings].astype(np.int64)))
        ][:SHOWN]
        tokens.append(edge(shelf, node) | {
            "share": float(gain[number] / total) if total else None,
            "zero_gain": bool(trie.train_count[node] == trie.train_count[parent]),
            "forced": len(siblings) == 0,
            "siblings": len(siblings),
            "most_trained_siblings": [edge(shelf, sibling) for sibling in most_trained],
        })  # fmt: skip
        if number and len(siblings):
            others = np.setdiff1d(items_under(trie, parent), items_under(trie, node))
            parting.insert(
                0, {"tokens": number, "items": len(others), "most_trained": shelf.some(others)}
            )
    forced = np.flatnonzero(np.diff([0, *(token["forced"] for token in tokens), 0])).reshape(-1, 2)
    same_path = np.setdiff1d(items_under(trie, nodes[-1]), [item])
    return shelf.item(item) | {
        "tokens": tokens,
        "gain": total,
        "deciding": max(
            (number for number, token in enumerate(tokens, 1) if not token["forced"]), default=None
        ),
        "forced_runs": [[int(first) + 1, int(end)] for first, end in forced],
        "parting": parting,
        "same_path": {"items": len(same_path), "most_trained": shelf.some(same_path)},
    }


def edge(shelf: Shelf, node: int) -> dict:
    """Return what is said of the token on the edge into a node."""
    trie, token = shelf.trie, shelf.trie.token[node]
    counts = {"items": int(trie.num_items[node]), "train_count": int(trie.train_count[node])}
    return {
        "token": int(token),
        "text": shelf.text(token),
        "gain": float(shelf.gain[node]),
        **counts,
    }


def items_under(trie: TokenTrie, node: int) -> np.ndarray:
    """Return the ids of the items under a node."""
    return trie.item_order[trie.first_item[node] : trie.first_item[node] + trie.num_items[node]]


def worst(shelf: Shelf, count: int) -> dict:
    """Return the items that are hardest to tell apart, `count` of each sort, and how many there are of the last two.

    `latest`: those whose deciding token comes last, and of these the ones where it gains least. `duplicates`: the items of equal
    paths, the most items first. `prefixes`: items whose deciding token only ends what others go on with.
    """
    trie, offsets = shelf.trie, shelf.catalogue.offsets
    nodes, begin = trie.path_nodes(offsets), offsets[:-1]
    decides = (np.diff(trie.child_begin) > 1)[trie.parent[nodes]]
    number = np.arange(1, len(nodes) + 1) - np.repeat(begin, np.diff(offsets))
    deciding = np.maximum.reduceat(np.where(decides, number, 0), begin)  # 0: all tokens are forced
    gain = shelf.gain[nodes[begin + np.maximum(deciding - 1, 0)]]
    latest = np.lexsort((gain, -deciding))
    shared = np.flatnonzero(trie.is_leaf & (trie.num_items > 1))
    shared = shared[np.argsort(-trie.num_items[shared], kind="stable")]
    near_end = deciding[latest] >= np.maximum(
        np.diff(offsets)[latest] - 1, 1
    )  # a line break and EOS, or EOS
    prefixes = [item for item in latest[near_end] if ends_there(shelf, item, deciding[item] - 1)]

    def entry(item: int) -> dict:
        numbers = {
            "deciding": int(deciding[item]),
            "tokens": int(np.diff(offsets)[item]),
            "gain": float(gain[item]),
        }
        return shelf.item(item) | numbers

    return {
        "latest": [entry(item) for item in latest[:count]],
        "duplicate_paths": len(shared),
        "duplicates": [
            [shelf.item(item) for item in items_under(trie, leaf)] for leaf in shared[:count]
        ],
        "prefix_items": len(prefixes),
        "prefixes": [entry(item) for item in prefixes[:count]],
    }


def ends_there(shelf: Shelf, item: int, num_tokens: int) -> bool:
    """Whether an item's first tokens are all of its title or codes, so that the next one but ends it."""
    path = shelf.catalogue.path(item)
    if shelf.catalogue.kind == "semantic-id":
        return num_tokens == len(path) - 1
    return shelf.tokenizer.decode(path[:num_tokens]) == shelf.names[item][0]


def visible(text: str) -> str:
    """Return text whose line breaks are seen and whose other control characters are spelt out."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else repr(c)[1:-1] for c in text)


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for wide characters, none for combining ones."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def fit(text: str, width: int) -> str:
    """Return `text` in exactly `width` columns: filled up, or cut off with an ellipsis."""
    if columns(text) > width:
        while columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text))


def bar(value: float, largest: float) -> str:
    """Return a bar of at most BAR_WIDTH columns in eighths of a column; a hatched one for a negative value."""
    eighths = round(8 * BAR_WIDTH * abs(value) / largest) if largest else 0
    drawn = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
    return drawn if value >= 0 else "░" * len(drawn)


def painter(stream):
    """Return a function (text, code) → text in that style, where `stream` is a terminal and NO_COLOR is not set."""
    colourful = (
        stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )
    return lambda text, code: f"\033[{code}m{text}\033[0m" if colourful and text else text


def named(item: dict) -> str:
    """Return an item on one line."""
    return f"[{item['item']}] {fit(visible(item['name']), NAME_WIDTH).rstrip()} ({item['train_count']}×)"


def plural(count: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{count} {noun}" + "s" * (count != 1)


def text_of(tokens: list[dict]) -> str:
    """Return the text of some tokens in a row."""
    return "".join(token["text"] for token in tokens).replace("␣", " ")


def and_more(shown: list[str], total: int) -> str:
    """Join what is shown and say how much is not."""
    return " · ".join(shown) + (f" · {total - len(shown)} more" if total > len(shown) else "")


def print_item(item: dict, paint) -> None:
    """Print a description as `describe` makes it, a run of forced tokens on one line."""
    tokens, largest = item["tokens"], max(abs(token["gain"]) for token in item["tokens"])
    print(paint(f"item {item['item']}: {visible(item['name'])}", BOLD))
    rows = plural(item["train_count"], "training row")
    print(f"  {rows}, {len(tokens)} tokens, {item['gain']:.3f} nats")
    print(
        f"         {fit('token', TOKEN_WIDTH + BAR_WIDTH + 1)} {'nats':>7} {'share':>6} {'items':>8} {'training':>9}"
    )
    end_of = dict(item["forced_runs"])
    number = 1
    while number <= len(tokens):
        token, last = tokens[number - 1], end_of.get(number, number)
        counts = f"{token['items']:>8} {token['train_count']:>9}"
        if token["forced"]:
            run = fit(text_of(tokens[number - 1 : last]), TOKEN_WIDTH + BAR_WIDTH + 1)
            label = f"{number}-{last}" if last > number else str(number)
            print(paint(f"  {label:>6} {run} {'forced':>14} {counts}", DIM))
        else:
            drawn = fit(bar(token["gain"], largest), BAR_WIDTH)
            share = f"{token['share']:.1%}" if token["share"] is not None else ""
            numbers = (
                f"{token['gain']:7.3f} {share:>6} {counts}" + "  zero gain" * token["zero_gain"]
            )
            print(f"  {number:>6} {fit(token['text'], TOKEN_WIDTH)} {paint(drawn, BAR)} {numbers}")
            others = [
                f"{other['text']} ({plural(other['items'], 'item')}, {other['train_count']}×, {other['gain']:.3f})"
                for other in token["most_trained_siblings"]
            ]
            print(paint(f"         or {and_more(others, token['siblings'])}", DIM))
        number = last + 1
    if same := item["same_path"]["items"]:
        print(
            f"  the same tokens: {and_more([named(other) for other in item['same_path']['most_trained']], same)}"
        )
    for part in item["parting"]:
        others = and_more([named(other) for other in part["most_trained"]], part["items"])
        print(f"  {text_of(tokens[: part['tokens']])}… is shared with {others}")
    print()


def print_worst(found: dict, paint) -> None:
    """Print what `worst` found."""
    for key, title in (
        ("latest", "told apart latest"),
        ("prefixes", f"ending where others go on: {plural(found['prefix_items'], 'item')}"),
    ):
        print(paint(title, BOLD))
        for item in found[key]:
            print(
                f"  token {item['deciding']:>3} of {item['tokens']:>3} decides, {item['gain']:7.3f} nats  {named(item)}"
            )
    print(paint(f"equal token paths: {found['duplicate_paths']}", BOLD))
    for items in found["duplicates"]:
        print(f"  {and_more([named(item) for item in items[:SHOWN]], len(items))}")


def main(argv: list[str] | None = None) -> int:
    """Parse, build the catalogue and its trie, print."""
    parser = argparse.ArgumentParser(
        prog="igd show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="*", metavar="ITEM", help="id, title or part of a title")
    parser.add_argument(
        "--dataset",
        required=True,
        help="canonical dataset folder (igd prepare makes one)",
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder or hub name")
    parser.add_argument(
        "--item_kind",
        choices=KINDS,
        help="titles or codes, where a dataset has both; default: titles if any",
    )
    parser.add_argument(
        "--entropy", choices=ENTROPIES, default="prior", help="definition of the entropy"
    )
    parser.add_argument(
        "--worst",
        type=int,
        default=0,
        metavar="N",
        help="list the N least distinguishable items of each sort",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=3,
        metavar="N",
        help="items shown of those that an ITEM names; default 3",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)
    if not arguments.items and not arguments.worst:
        raise UsageError(
            "nothing to show: name an item (id, title or part of it), or give --worst N"
        )
    if arguments.worst < 0 or arguments.limit < 1:
        raise UsageError(
            f"--worst {arguments.worst} and --limit {arguments.limit} must be numbers of items"
        )
    dataset, tokenizer = (
        InteractionDataset.load(arguments.dataset),
        load_tokenizer(arguments.tokenizer),
    )
    shelf = Shelf.build(dataset, tokenizer, arguments.item_kind, arguments.entropy)
    matches = {wanted: find(shelf, wanted) for wanted in arguments.items}
    shown = [
        describe(shelf, item)
        for item in dict.fromkeys(i for found in matches.values() for i in found[: arguments.limit])
    ]
    least = worst(shelf, arguments.worst) if arguments.worst else None
    if arguments.json:
        print(json.dumps({"entropy": arguments.entropy, "items": shown, "worst": least}))
        return 0
    paint = painter(sys.stdout)
    for item in shown:
        print_item(item, paint)
    for wanted, found in matches.items():
        if rest := found[arguments.limit :]:
            others = and_more(
                [named(shelf.item(item)) for item in rest[: 2 * arguments.limit]], len(rest)
            )
            print(f"{len(found)} items match {wanted!r}; also: {others}\n")
    if least:
        print_worst(least, paint)
    return 0


if __name__ == "__main__":
    distributed.run(main)
