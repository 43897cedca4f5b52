"""Benchmark: token trie, prior gain and zero-gain flags, against a trie of dicts.

    python tools/bench/trie.py [--quick]

Items are synthetic and resemble book titles (seed 0): about 12 tokens, Zipf-distributed out of
151,936. Half of the items belong to series that share their first tokens. Every item ends in tokens
of its own, "\\n" and EOS. Training counts are Zipf-distributed, and one item in ten is cold.

Every measurement runs in a process of its own, with one thread. Memory is the process's peak
above what it had with the input loaded. Time is the median of the measurements. The trie of dicts
is written as one would usually write it: a node is a dict from token to child, and keeps its
numbers under string keys. The outputs of both sides are compared array by array. Tokenization is
timed apart: `Catalogue.build` on synthetic titles.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _common import finish, peak_bytes, print_table, run_fresh

from igd_ds.items.decisiveness import information_gain, zero_gain
from igd_ds.items.trie import TokenTrie

EOS, NEWLINE, VOCABULARY = 0, 1, 151_936
OUTPUTS = ("token", "parent", "depth", "num_items", "train_count", "zero", "gain")
GAIN_TOLERANCE = 1e-6  # relative: ours is stored as fp32 (6e-8), the trie of dicts keeps fp64


def make_items(num_items: int, folder: Path) -> None:
    """Write token_ids, offsets and counts of `num_items` synthetic items."""
    rng = np.random.default_rng(0)

    def zipf_tokens(size, kinds=VOCABULARY - 2):
        # Log-uniform ranks have the density 1/rank. Tokens 0 and 1 are EOS and newline.
        return 2 + (np.exp(rng.random(size) * np.log(kinds)) - 1).astype(np.int32)

    # Which items belong to which series, and how many tokens each has.
    num_series = max(num_items // 20, 1)
    series_length = rng.integers(2, 7, num_series)
    series_tokens = zipf_tokens((num_series, 6))
    series_tokens[:, 0] = zipf_tokens(num_series, 5_000)
    series = (num_series * rng.random(num_items) ** 2).astype(np.int64)
    shared = np.where(rng.random(num_items) < 0.5, series_length[series], 0)
    own = 2 + rng.poisson(6.2, num_items)
    length = shared + own + 2

    # Their tokens: first those of the series, then their own.
    offsets = np.concatenate([[0], np.cumsum(length)])
    token_ids = zipf_tokens(offsets[-1])
    token_ids[offsets[:-1]] = zipf_tokens(num_items, 5_000)  # few of the tokens start a title
    for k in range(6):
        in_series = np.flatnonzero(shared > k)
        token_ids[offsets[in_series] + k] = series_tokens[series[in_series], k]
    token_ids[offsets[1:] - 2] = NEWLINE
    token_ids[offsets[1:] - 1] = EOS

    counts = np.minimum(rng.zipf(1.6, num_items), 10_000) * (rng.random(num_items) > 0.1)
    np.save(folder / "token_ids.npy", token_ids.astype(np.int32))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "counts.npy", counts)
    print("{}")


def build_ours(token_ids, offsets, counts):
    """Return our trie, its prior gain in fp32 and its zero-gain flags."""
    trie = TokenTrie.build(token_ids, offsets, counts)
    return trie, information_gain(trie, "prior", np.float32), zero_gain(trie)


def flatten_ours(built) -> dict:
    """Return the output arrays by name."""
    trie, gain, zero = built
    return {"zero": zero, "gain": gain} | {name: getattr(trie, name) for name in OUTPUTS[:5]}


def build_plain(token_ids, offsets, counts):
    """Do the same with dicts: insert every item, then compute entropies and gains recursively."""
    root = {"items": 0, "count": 0}
    for item in range(len(offsets) - 1):
        count = int(counts[item])
        node = root
        node["items"] += 1
        node["count"] += count
        for token in token_ids[offsets[item] : offsets[item + 1]].tolist():
            child = node.get(token)
            if child is None:
                child = node[token] = {"items": 0, "count": 0}
            node = child
            node["items"] += 1
            node["count"] += count
        node.setdefault("ids", []).append(item)

    total = root["count"]

    def add_gains(node):  # returns the entropy
        if "ids" in node:
            p = node["count"] / total
            return -p * math.log(p) if p > 0 else 0.0
        children = [child for key, child in node.items() if type(key) is int]
        entropies = [add_gains(child) for child in children]
        entropy = math.fsum(entropies)
        for child, below in zip(children, entropies, strict=True):
            child["zero"] = child["count"] == node["count"]
            child["gain"] = 0.0 if child["zero"] else entropy - below
        return entropy

    add_gains(root)
    return root


def flatten_plain(root) -> dict:
    """Return the output arrays by name, in the breadth-first order of the flat trie."""
    out = {name: [] for name in OUTPUTS}
    level, depth, next_node = [(-1, -1, root)], 0, 1

    while level:
        below = []
        for token, parent, node in level:
            numbers = (
                token,
                parent,
                depth,
                node["items"],
                node["count"],
                node.get("zero", False),
                node.get("gain", 0.0),
            )
            for name, value in zip(OUTPUTS, numbers, strict=True):
                out[name].append(value)

        for number, (_, _, node) in enumerate(level, next_node - len(level)):
            below += [
                (token, number, node[token])
                for token in sorted(key for key in node if type(key) is int)
            ]
        level, depth, next_node = below, depth + 1, next_node + len(below)
    return {name: np.array(values) for name, values in out.items()}


def measure(side: str, folder: Path, save: bool) -> None:
    """Load, build once, and print seconds and peak memory; with `save`, write the outputs, too.

    It runs in a fresh process.
    """
    token_ids, offsets, counts = (
        np.load(folder / f"{name}.npy") for name in ("token_ids", "offsets", "counts")
    )
    build, flatten = (build_ours, flatten_ours) if side == "ours" else (build_plain, flatten_plain)

    loaded = peak_bytes()
    start = time.perf_counter()
    built = build(token_ids, offsets, counts)
    seconds, peak = time.perf_counter() - start, peak_bytes() - loaded
    nodes = built[0].num_nodes if side == "ours" else 0
    if save:
        for name, array in flatten(built).items():
            np.save(folder / f"{side}-{name}.npy", array)
    print(json.dumps({"seconds": seconds, "bytes": peak, "nodes": nodes}), flush=True)
    os._exit(0)  # freeing ten million dicts one by one would take longer than the build


def compare(folder: Path) -> None:
    """Assert that both sides wrote the same trie: equal integers and flags, gains equal to fp32."""
    for name in OUTPUTS:
        ours, plain = (np.load(folder / f"{side}-{name}.npy") for side in ("ours", "plain"))
        if name == "gain":
            np.testing.assert_allclose(ours, plain, rtol=GAIN_TOLERANCE, atol=0)
        else:
            np.testing.assert_array_equal(ours, plain, err_msg=name)
    print(json.dumps({"equal": True}))


def tokenize(num_items: int) -> None:
    """Time `Catalogue.build` on titles, with a small byte-level BPE that is trained here."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    # Imported here, so that the processes that measure memory do not load them.
    from igd_ds.data.dataset import InteractionDataset, Split
    from igd_ds.items.catalogue import Catalogue

    rng = np.random.default_rng(0)
    words = np.array(
        ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(20_000)]
    )
    ranks = (np.exp(rng.random((num_items, 7)) * np.log(len(words))) - 1).astype(int)
    titles = [" ".join(row) for row in words[ranks]]

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        titles[:20_000], 8_192, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    train = Split(
        name="train",
        user_ids=np.zeros(1, np.int64),
        history_items=np.empty(0, np.int32),
        history_offsets=np.zeros(2, np.int64),
        targets=np.zeros(1, np.int32),
        timestamps=None,
    )
    dataset = InteractionDataset(
        folder=Path("in memory"),
        info={},
        titles=titles,
        semantic_ids=None,
        splits={"train": train},
        fingerprint="",
    )

    start = time.perf_counter()
    catalogue = Catalogue.build(dataset, tokenizer)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens_per_item": len(catalogue.token_ids) / num_items}))


def run_step(step: str, size: int, folder: Path, save: bool) -> None:
    """Do the step of a child process."""
    if step == "make":
        make_items(size, folder)
    elif step == "compare":
        compare(folder)
    elif step == "tokenize":
        tokenize(size)
    else:
        measure(step, folder, save)


def measure_size(size: int) -> dict[str, dict[str, float]]:
    """Return the medians of seconds, bytes and nodes of each side; above 1 M items of ours alone.

    By its bytes per node at 1 M items, the trie of dicts would need over 10 GiB at 5 M.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_fresh(__file__, "make", size, folder)
        repeats = {"ours": 3, "plain": 1 if size == 10**6 else 3}
        if size > 10**6:
            del repeats["plain"]

        medians = {}
        for side, times in repeats.items():
            measured = [run_fresh(__file__, side, size, folder, time == 0) for time in range(times)]
            medians[side] = {
                key: statistics.median(values[key] for values in measured) for key in measured[0]
            }
        if "plain" in medians:
            run_fresh(__file__, "compare", size, folder)
    return medians


def main() -> None:
    """Measure all sizes, print the table and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="10 k and 100 k items only; under 50 s"
    )
    quick = parser.parse_args().quick

    sizes = [10_000, 100_000] if quick else [10_000, 100_000, 1_000_000, 5_000_000]
    rows, figures = [], {}
    for size in sizes:
        label = f"{size // 1000}k" if size < 10**6 else f"{size // 10**6}m"
        medians = measure_size(size)
        ours = medians["ours"]
        figures["bytes_per_node"] = ours["bytes"] / ours["nodes"]
        row = [f"{size:,}", f"{int(ours['nodes']):,}", ours["seconds"], ours["bytes"] / 2**20]

        if plain := medians.get("plain"):
            speedup, ratio = plain["seconds"] / ours["seconds"], plain["bytes"] / ours["bytes"]
            row += [plain["seconds"], plain["bytes"] / 2**20, speedup, ratio]
            if size == (100_000 if quick else 10**6):
                figures |= {f"speedup_{label}": speedup, f"memory_ratio_{label}": ratio}
        else:
            row += ["-"] * 4
            figures |= {
                f"seconds_{label}": ours["seconds"],
                f"peak_gib_{label}": ours["bytes"] / 2**30,
            }
        rows.append([*row, figures["bytes_per_node"]])

    header = "items,nodes,s,peak MiB,dicts s,dicts MiB,speed x,memory x,bytes/node"
    print_table(header.split(","), rows)
    titles = 20_000 if quick else 100_000
    text = run_fresh(__file__, "tokenize", titles, "")
    print(
        f"tokenization, apart: {titles:,} titles ({text['tokens_per_item']:.1f} tokens each) in "
        f"{text['seconds']:.2f} s"
    )
    finish("trie", figures, quick)


if __name__ == "__main__":
    if len(sys.argv) > 2:  # a step in its own process: STEP SIZE FOLDER [SAVE]
        run_step(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), save=sys.argv[4:] == ["True"])
    else:
        main()
