"""igd show: every number against a loop over the items, names, the printed page and its colours."""

import contextlib
import io
import json
import math
import os
import pty
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import transformers
from test_decisiveness import Definitions

from igd_ds.commands import show
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.errors import UsageError
from igd_ds.items.decisiveness import ENTROPIES
from igd_ds.items.ids import ItemIds
from igd_ds.items.view import MOST_TRAINED, CatalogueView, describe, find, visible, worst

TITLES = ["ab", "abc", "ba", "BA", "bcc", "cab", "caba", "c", "aa", "acb", "日本", "ba", "c d"]
# Items 8, 9 and 10 are cold; 2 and 11 share a path.
TARGETS = [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 7, 11, 12]
CODES = [
    ["<a_1>", "<b_1>"],
    ["<a_1>", "<b_1>", "<c_1>"],
    ["<a_1>", "<b_2>"],
    ["<a_2>", "<b_1>"],
    ["<a_2>", "<b_1>"],
]


def dataset_of(titles, codes, targets):
    rows, nothing = np.arange(len(targets)), np.zeros(0, np.int32)
    offsets = np.zeros(len(targets) + 1, np.int64)
    train = Split("train", rows, nothing, offsets, np.array(targets, np.int32), None)
    return InteractionDataset(Path("nowhere"), {"name": "toy"}, titles, codes, {"train": train}, "")


def letters():
    """One token per byte, as the tokenizers of language models spell it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def codes():
    vocabulary = {
        code: i for i, code in enumerate(sorted({code for path in CODES for code in path}))
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


TEXT = (dataset_of(TITLES, None, TARGETS), letters())
SEMANTIC = (dataset_of(["Fiddle", *[None] * 4], CODES, [0, 0, 1, 2, 3, 4, 4]), codes())


@pytest.fixture
def run(monkeypatch):
    """Run the command on a catalogue; return what it printed, or None if a stream is given."""

    def command(catalogue, *flags, stream=None, ids_of=None):
        monkeypatch.setattr(show.InteractionDataset, "load", lambda folder: catalogue[0])
        monkeypatch.setattr(show, "load_tokenizer", lambda name: catalogue[1])
        ids = ids_of or ItemIds.numbered(catalogue[0].num_items)
        monkeypatch.setattr(show.ItemIds, "read", lambda folder: ids)
        with contextlib.redirect_stdout(stream or io.StringIO()) as printed:
            assert show.main(["--dataset", "D", "--tokenizer", "T", *flags]) == 0
        return None if stream else printed.getvalue()

    return command


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("catalogue", [TEXT, SEMANTIC], ids=["text", "semantic-id"])
def test_every_figure_equals_brute_force(catalogue, entropy):
    dataset, tokenizer = catalogue
    view = CatalogueView.build(
        dataset, tokenizer, "text" if catalogue is TEXT else "semantic-id", entropy
    )
    paths = [tuple(view.catalogue.path(item).tolist()) for item in range(dataset.num_items)]
    counts = [
        int(np.sum(dataset.splits["train"].targets == item)) for item in range(dataset.num_items)
    ]
    defined = Definitions(paths, counts)
    uncertainty = (
        defined.prior
        if entropy == "prior"
        else (lambda p: defined.conditional(p) if defined.mass(p) else 0.0)
    )

    for item, path in enumerate(paths):
        found = describe(view, item)
        total = uncertainty(()) - uncertainty(path)
        assert (
            found["item"] == item
            and found["train_count"] == counts[item]
            and found["gain"] == pytest.approx(total)
        )

        forced, parting = [], []
        for number, token in enumerate(found["tokens"]):
            before, after = path[:number], path[: number + 1]
            siblings = {other[: number + 1] for other in paths if other[:number] == before} - {
                after
            }
            gain = uncertainty(before) - uncertainty(after)
            assert token["token"] == path[number] and token["gain"] == pytest.approx(
                gain, abs=1e-12
            )
            assert token["share"] == pytest.approx(gain / total, abs=1e-12)
            assert token["items"] == len(defined.items[after]) and token[
                "train_count"
            ] == defined.mass(after)
            assert token["zero_gain"] == (defined.mass(before) == defined.mass(after))
            assert token["siblings"] == len(siblings) and token["forced"] == (not siblings)
            shown = sorted(siblings, key=lambda prefix: (-defined.mass(prefix), prefix))[
                :MOST_TRAINED
            ]
            assert [s["token"] for s in token["most_trained_siblings"]] == [
                prefix[-1] for prefix in shown
            ]
            for sibling, prefix in zip(token["most_trained_siblings"], shown, strict=True):
                assert (sibling["items"], sibling["train_count"]) == (
                    len(defined.items[prefix]),
                    defined.mass(prefix),
                )
                assert sibling["gain"] == pytest.approx(
                    uncertainty(before) - uncertainty(prefix), abs=1e-12
                )
            forced += [number + 1] * (not siblings)
            others = [
                i
                for i in range(len(paths))
                if paths[i][:number] == before and paths[i][: number + 1] != after
            ]
            if number and others:
                most = sorted(others, key=lambda i: (-counts[i], i))[:MOST_TRAINED]
                parting.insert(0, (number, len(others), most))
        assert [
            number for first, last in found["forced_runs"] for number in range(first, last + 1)
        ] == forced
        assert all(
            a[1] + 1 < b[0]
            for a, b in zip(found["forced_runs"], found["forced_runs"][1:], strict=False)
        )
        assert found["deciding"] == max(set(range(1, len(path) + 1)) - set(forced))
        assert [
            (p["tokens"], p["items"], [i["item"] for i in p["most_trained"]])
            for p in found["parting"]
        ] == parting

        twins = [i for i in range(len(paths)) if i != item and paths[i] == path]
        assert found["same_path"]["items"] == len(twins) and {
            i["item"] for i in found["same_path"]["most_trained"]
        } == set(twins)


@pytest.mark.parametrize("catalogue", [TEXT, SEMANTIC], ids=["text", "semantic-id"])
def test_the_worst_equal_brute_force(catalogue):
    dataset, tokenizer = catalogue
    view = CatalogueView.build(
        dataset, tokenizer, None if catalogue is TEXT else "semantic-id", "prior"
    )
    described = [describe(view, item) for item in range(dataset.num_items)]
    found = worst(view, 100)

    keys = [(-d["deciding"], d["tokens"][d["deciding"] - 1]["gain"]) for d in described]
    assert sorted(keys) == [(-entry["deciding"], entry["gain"]) for entry in found["latest"]]
    assert [keys[entry["item"]] for entry in found["latest"]] == sorted(keys)
    assert [entry["tokens"] for entry in found["latest"]] == [
        len(described[e["item"]]["tokens"]) for e in found["latest"]
    ]
    whole = (
        ["".join(path) for path in dataset.semantic_ids]
        if catalogue is SEMANTIC
        else dataset.titles
    )
    longer = {
        i for i in range(len(whole)) if any(w != whole[i] and w.startswith(whole[i]) for w in whole)
    }
    assert {entry["item"] for entry in found["prefixes"]} == longer and found[
        "prefix_items"
    ] == len(longer) > 0

    twins = [[2, 11]] if catalogue is TEXT else [[3, 4]]
    assert [[entry["item"] for entry in same] for same in found["duplicates"]] == twins and found[
        "duplicate_paths"
    ] == 1
    assert [entry["item"] for entry in worst(view, 1)["latest"]] == [found["latest"][0]["item"]]


def test_an_item_without_a_title_begins_all_others():
    view = CatalogueView.build(dataset_of(["", "ab", "abc"], None, [0, 1, 2]), letters())
    assert {entry["item"] for entry in worst(view, 9)["prefixes"]} == {0, 1}


def test_what_names_an_item():
    view = CatalogueView.build(*TEXT, None, "prior")
    assert find(view, "5") == [5]
    assert find(view, " ba ") == [
        3,
        2,
        11,
    ]  # exact before parts ("caba"), whatever the case, most trained first
    assert find(view, "AB") == [0] and find(view, "cA") == [6, 5]
    assert find(view, "本") == [10]
    with pytest.raises(UsageError, match="no item 'cabab' among 13; nearest: 'caba', 'cab'"):
        find(view, "cabab")
    with pytest.raises(UsageError, match="no item '99' among 13; nearest: none"):
        find(view, "99")
    with pytest.raises(UsageError, match="no item ''"):
        find(view, "")

    view = CatalogueView.build(*SEMANTIC, "semantic-id", "prior")
    assert (
        find(view, "<a_1><b_1>") == [0]
        and find(view, "fidd") == [0]
        and find(view, "<b_1>") == [0, 4, 1, 3]
    )


def test_an_id_that_is_a_title_too():
    dataset = dataset_of(["1984", "1", "x"], None, [0, 1, 1])
    assert find(CatalogueView.build(dataset, letters(), None, "prior"), "1") == [1]
    dataset = dataset_of(["x", "0"], None, [0, 1, 1])
    assert find(CatalogueView.build(dataset, letters(), None, "prior"), "0") == [1, 0]


PAGE = """\
item 6: caba
  3 training rows, 6 tokens, 1.776 nats
         token                                          nats  share    items  training
       1 c                  ████████████████████████   1.211  68.2%        4         6
         or a (4 items, 3×, 1.640) · b (3 items, 3×, 1.640) · B (1 item, 2×, 1.829) · 1 more
       2 a                  ███████▌                   0.377  21.2%        2         4
         or ⏎ (1 item, 1×, 0.707) · ␣ (1 item, 1×, 0.707)
       3 b                                                   forced        2         4
       4 a                  ███▊                       0.189  10.6%        1         3
         or ⏎ (1 item, 1×, 0.330)
     5-6 ⏎<eos>                                              forced        1         3
  cab… is shared with [5] cab (1×)
  c… is shared with [7] c (1×) · [12] c d (1×)

"""


def test_the_printed_page(run):
    assert run(TEXT, "6") == PAGE
    assert "zero gain" in run(TEXT, "1") and "the same tokens: [11] ba (1×)" in run(TEXT, "2")


def test_items_are_named_by_the_sources_ids(run):
    """Our item 5 is the source's B15, and our item 0 is its item 6."""
    ids = ItemIds(pa.array(["6", *(f"B{10 + item}" for item in range(1, len(TITLES)))]))
    assert run(TEXT, "B15", ids_of=ids).startswith("item B15: cab\n")
    assert run(TEXT, "6", ids_of=ids).startswith("item 6: ab\n")
    assert "[B15] cab (1×)" in run(TEXT, "B16", ids_of=ids)
    assert run(TEXT, "5", "--ids", "dense", ids_of=ids).startswith("item B15: cab\n")
    (item,) = json.loads(run(TEXT, "B15", "--json", ids_of=ids))["items"]
    assert (item["item"], item["source_id"]) == (5, "B15")

    with pytest.raises(UsageError, match="no item '5' .* is a dense id: add --ids dense if"):
        run(TEXT, "5", ids_of=ids)
    with pytest.raises(UsageError, match="no item 'B15' .* is a source id: add --ids source if"):
        run(TEXT, "B15", "--ids", "dense", ids_of=ids)


def test_more_matches_than_shown(run):
    printed = run(TEXT, "ba", "--limit", "1")
    assert printed.startswith("item 3: BA\n") and printed.count("training rows") == 1
    assert "3 items match 'ba'; also: [2] ba (1×) · [11] ba (1×)\n" in printed
    assert (
        run(TEXT, "ba", "3", "--limit", "1").count("item 3: BA\n") == 1
    )  # named twice, shown once


def test_json_and_worst(run):
    found = json.loads(run(TEXT, "c", "--json", "--worst", "2", "--entropy", "conditional"))
    assert found["entropy"] == "conditional" and [item["item"] for item in found["items"]] == [7]
    assert len(found["worst"]["latest"]) == 2
    assert json.loads(run(TEXT, "c", "--json"))["worst"] is None
    printed = run(SEMANTIC, "--worst", "1", "--item_kind", "semantic-id")
    assert (
        "told apart latest\n  token   3 of   3 decides" in printed
        or "told apart latest\n  token   3 of   4 decides" in printed
    )
    assert "ending where others go on: 1 item\n" in printed
    assert "equal token paths: 1\n  [3] <a_2><b_1> (1×) · [4] <a_2><b_1> (2×)\n" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name an item"),
        (("ab", "--limit", "0"), "--limit 0"),
        (("--worst", "-1"), "--worst -1"),
        (("xyz",), "no item 'xyz'"),
    ],
)
def test_bad_input(run, flags, message):
    with pytest.raises(UsageError, match=message):
        run(TEXT, *flags)


def read_terminal(leader):
    """All that was written to a pseudo-terminal whose other end is closed."""
    written = b""
    with contextlib.suppress(OSError):  # Linux: EIO at the end
        while piece := os.read(leader, 4096):
            written += piece
    os.close(leader)
    return written.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("no_colour", [None, "", "1"])
def test_colour_only_on_a_terminal(run, monkeypatch, no_colour):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour is not None:
        monkeypatch.setenv("NO_COLOR", no_colour)
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        run(TEXT, "6", stream=terminal)
    written = read_terminal(leader)
    if no_colour:
        assert written == PAGE
    else:
        assert "\033[1mitem 6: caba\033[0m" in written and "\033[36m█" in written
        plain = written
        for code in ("\033[0m", "\033[1m", "\033[2m", "\033[36m"):
            plain = plain.replace(code, "")
        assert plain == PAGE


def test_columns_of_wide_and_of_control_characters():
    assert show.columns("日本x") == 5 and show.columns("e\u0301") == 1
    assert (
        show.fit("日本語", 5) == "日本…"
        and show.fit("日本語", 4) == "日… "
        and show.fit("ab", 4) == "ab  "
    )
    assert visible("a\nb\033[31m\t") == "a⏎b\\x1b[31m\\t"


def test_bars_are_proportional():
    assert (
        show.bar(1.0, 1.0) == "█" * show.BAR_WIDTH
        and show.bar(0.0, 1.0) == ""
        and show.bar(0.0, 0.0) == ""
    )
    for value in np.linspace(0, 1, 50):
        drawn = show.bar(value, 1.0)
        eighths = 8 * drawn.count("█") + sum(show.EIGHTHS.index(c) for c in drawn if c != "█")
        assert math.isclose(
            eighths / 8 / show.BAR_WIDTH, value, abs_tol=0.5 / 8 / show.BAR_WIDTH + 1e-9
        )
    assert show.bar(-0.5, 1.0) == "░" * (show.BAR_WIDTH // 2)
