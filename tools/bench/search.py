"""Benchmark: our constrained search against `model.generate`: same model, same prompts, same lists.

    python tools/bench/search.py [--quick] [--runs runs/search] [--lines NAME …]

The headline searches books-small's catalogue with the Qwen2 (hidden size 256, 4 layers) that
tools/search_models.sh trains on it. Embedding and head are padded to 151,936 rows; fp32, CPU, 2
threads, 10 beams, batch 16, α = 0.2, length penalty 0. It searches for 64 users of the test split
(--quick: 16), on some sides for fewer. Prompts have exactly 256 tokens: the newest tokens of the
user's history, behind those of other users where it is short. Without that model, the benchmark
takes random weights and a generated catalogue, and says so. The sides:

* generate: `generate` with a trie of dicts that is walked in Python for each beam, and a dense
  mask. This is what users of the published code have (_published_search.py).
* vectorised: `generate` with our `IGDLogitsProcessor`.
* CSR mask: `generate` with a mask after STATIC, on semantic IDs and T5.
* beam, exact: our searches.
* grid: our beam search for five values of α in one search.

In the headline's model the head is three quarters of the work, as in few real models. The lines
named SmolLM2-135M are of a pretrained model: fine-tuned for 300 steps of 8 rows on games-2015
(tools/search_models.sh), its own vocabulary of 49,152, the evaluator's own prompts; 10, 50 and 500
beams.

Every side has a process of its own, forked off one that has loaded model and catalogue. It searches
for one user to warm up, then for all users. Peak memory is the peak during the search, above what
lay in memory before it. The lists of all sides must be the same: equal scores to 5e-4, and the same
items in the same order, except for swaps of items whose scores are within 5e-4 (both plus 4e-7 of
the score).

Counts are per user:

* passes: calls of the model with tokens of the user, without the prompt's call. A token step is a
  pass that a search of one token per step would have made for that user.
* prompt positions: tokens through the decoder in its first call.
* positions: tokens through the decoder in all other calls, padding and ended beams included.
* lm-head rows: positions whose logits were computed.

Times: *scoring* is log-softmax and the logits processors; *rest* is neither model nor scoring.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _common import REPOSITORY, finish, peak_bytes, print_table, run_fresh
from _published_search import CsrMaskProcessor, DictTrieProcessor, Generate
from _search_problems import VOCABULARY, Line, Problem, generate_codes, load

from igd_ds.backbones import backbone_of
from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.engine import SearchResult, search
from igd_ds.search.processor import IGDLogitsProcessor
from igd_ds.search.scoring import Scoring, edge_weights

THREADS = 2
GRID = (0.0, 0.1, 0.2, 0.3, 0.4)
# In nats, and relative to the score. The books-small model amplifies fp32 rounding: where two sides
# are 2.7e-4 apart, the fp64 score lies in the middle between them. With random weights scores lie
# near −200, where fp32 numbers are 1.5e-5 apart.
SCORE_TOLERANCE, SWAP_GAP, RELATIVE = 5e-4, 5e-4, 4e-7
GENERATE = {
    "generate": DictTrieProcessor,
    "vectorised": IGDLogitsProcessor,
    "CSR mask": CsrMaskProcessor,
}

HEADLINE = Line("headline", {"generate": 64, "vectorised": 64, "beam": 64, "exact": 16, "grid": 64})
# The model has not learned prompts that begin with other users' tokens, so proofs are measured on
# the evaluator's own prompts.
OWN = replace(
    HEADLINE, name="own prompts", prompt=0, users={"generate": 16, "beam": 64, "exact": 64}
)
T5 = Line(
    "instruments, T5",
    {"CSR mask": 256, "vectorised": 256, "beam": 256},
    "t5",
    0,
    20,
    64,
    vocabulary=0,
    alpha=0.0,
)
# What a user has: a pretrained model with its own vocabulary, whose head is a small part of its
# work, and the prompts of the evaluator. All sides but the beam are slow here.
REAL = Line(
    "SmolLM2-135M", {"generate": 16, "vectorised": 16, "beam": 32}, "games-2015", 0, vocabulary=0
)
CONTRAST = {"vectorised": 16, "beam": 32}
ALL_BUT_GRID = {"generate": 16, "vectorised": 16, "beam": 64, "exact": 16}
LINES = [
    HEADLINE,
    OWN,
    replace(OWN, name="own prompts, α 0", alpha=0.0, users={"beam": 64, "exact": 64}),
    replace(HEADLINE, name="vocabulary as trained", vocabulary=0, users=ALL_BUT_GRID),
    replace(HEADLINE, name="prompt 64", prompt=64, users=CONTRAST),
    replace(HEADLINE, name="prompt 1024", prompt=1024, users=CONTRAST),
    replace(HEADLINE, name="20 beams", beams=20, users=CONTRAST),
    replace(HEADLINE, name="50 beams", beams=50, batch=8, users={"vectorised": 8, "beam": 16}),
    replace(HEADLINE, name="batch 1", batch=1, users=CONTRAST),
    replace(HEADLINE, name="batch 64", batch=64, users={"vectorised": 64, "beam": 64}),
    replace(
        HEADLINE, name="penalty 1", penalty=1.0, users={"vectorised": 16, "beam": 32, "exact": 8}
    ),
    replace(HEADLINE, name="3 k random items", source="generated:3000", users=CONTRAST),
    replace(HEADLINE, name="100 k random items", source="generated:100000", users=CONTRAST),
    replace(HEADLINE, name="1 M random items", source="generated:1000000", users=CONTRAST),
    replace(
        HEADLINE,
        name="industrial",
        source="industrial",
        prompt=0,
        users=ALL_BUT_GRID,
        row_positions=2048,
    ),
    replace(HEADLINE, name="instruments", source="instruments", prompt=0, users=ALL_BUT_GRID),
    T5,
    REAL,
    replace(REAL, name="SmolLM2-135M, 50 beams", beams=50, users={"vectorised": 4, "beam": 16}),
    replace(
        REAL, name="SmolLM2-135M, 500 beams", beams=500, batch=1, users={"vectorised": 1, "beam": 4}
    ),
]


class Search:
    """Our search with the interface of `Generate`."""

    def __init__(self, problem: Problem, line: Line, method: str, alphas: tuple[float, ...]):
        self.model = problem.model
        self.tree = backbone_of(self.model.config).prompt_tree(self.model)
        self.trie = SearchTrie.build(problem.trie)
        options = ScoringOptions(alpha=alphas, length_penalty=line.penalty)
        self.scoring = Scoring.build(problem.trie, problem.gain, options)
        self.num_beams, self.method = line.beams, method
        self.limits = Limits(row_positions=line.row_positions)

    def __call__(self, prompts: list[np.ndarray]) -> SearchResult:
        """Search for one batch."""
        self.tree.prefill(prompts)
        return search(
            self.tree, self.trie, self.scoring, self.num_beams, self.method, limits=self.limits
        )

    def warm_up(self, prompts: list[np.ndarray]) -> None:
        """Make a beam search, which is short even where an exact search is not."""
        self.tree.prefill(prompts)
        search(self.tree, self.trie, self.scoring, self.num_beams)

    def lists(self, found: SearchResult) -> tuple[np.ndarray, np.ndarray]:
        """Return leaves int64 and scores float32, each (nA, B, K)."""
        return found.leaves.long().numpy(), found.scores.numpy()


def make_side(side: str, problem: Problem, line: Line) -> Generate | Search:
    """Build the trie or masks of a side; the time it takes is not measured."""
    if side in ("beam", "exact", "grid"):
        method = "exact" if side == "exact" else "beam"
        return Search(problem, line, method, GRID if side == "grid" else (line.alpha,))

    weights = edge_weights(problem.trie, problem.gain, "per-node", line.alpha)
    arguments = (problem.trie,) if side == "CSR mask" else (problem.trie, weights)
    assert side != "CSR mask" or line.alpha == 0, "a CSR mask has no weights"
    return Generate(
        problem.model, problem.trie, partial(GENERATE[side], *arguments), line.beams, line.penalty
    )


class Probe:
    """Measures a side while it searches: seconds in model and scoring, passes, positions.

    It uses hooks. A wrapper around `forward` would change its signature, and `generate` would then
    ask for the logits of whole prompts. The decoder's first call in a batch is the prompt's and is
    counted apart.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.seconds, self.running = model, Counter(), 0
        self.passes = self.positions = self.prompt_positions = self.head_rows = 0

    def __enter__(self) -> "Probe":
        model, stack = self.model, ExitStack()
        modules = [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]
        handles = [module.register_forward_pre_hook(lambda *_: self.enter()) for module in modules]
        handles += [
            module.register_forward_hook(lambda *_: self.leave("model")) for module in modules
        ]
        handles += [model.get_decoder().register_forward_hook(self.count_pass, with_kwargs=True)]
        handles += [model.lm_head.register_forward_hook(self.count_rows)]
        for handle in handles:
            stack.callback(handle.remove)

        # `generate` takes log_softmax from torch.nn.functional, the other sides from torch.
        for owner, name in [
            (torch, "log_softmax"),
            (F, "log_softmax"),
            *((kind, "__call__") for kind in GENERATE.values()),
        ]:
            stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name))))
        self.close = stack.close
        return self

    def __exit__(self, *_):
        self.close()

    def begin_batch(self) -> None:
        """The next call of the decoder is a prompt's."""
        self.in_prompt = True

    def enter(self) -> None:
        """Start the clock, unless this happens within something that is timed."""
        self.running += 1
        if self.running == 1:
            self.began = time.perf_counter()

    def leave(self, kind: str) -> None:
        """Stop the clock that the matching `enter` started."""
        self.running -= 1
        if self.running == 0:
            self.seconds[kind] += time.perf_counter() - self.began

    def timed(self, function):
        """Return `function`, timed as scoring."""

        @wraps(function)
        def run(*arguments, **options):
            self.enter()
            try:
                return function(*arguments, **options)
            finally:
                self.leave("scoring")

        return run

    def count_pass(self, decoder, arguments, options, output) -> None:
        """Count the tokens of one call of the decoder."""
        positions = options["input_ids"].numel()
        if self.in_prompt:
            self.prompt_positions += positions
        else:
            self.passes += 1
            self.positions += positions
        self.in_prompt = False

    def count_rows(self, head, arguments, logits) -> None:
        """Count the positions of one call of the lm-head."""
        self.head_rows += logits.shape[:-1].numel()


def measure(line: Line, problem: Problem, side: str) -> dict:
    """Search for all users of a side, in a process of its own; return its lists and figures."""
    torch.set_num_threads(THREADS)
    searcher, prompts = make_side(side, problem, line), problem.prompts[: line.users[side]]
    searcher.warm_up(prompts[:1])

    with open("/proc/self/statm") as file:
        loaded = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    with Probe(problem.model) as probe:
        found, began = [], time.perf_counter()
        for begin in range(0, len(prompts), line.batch):
            probe.begin_batch()
            found.append(searcher(prompts[begin : begin + line.batch]))
        seconds = time.perf_counter() - began

    peak, (leaves, scores) = peak_bytes() - loaded, zip(*map(searcher.lists, found), strict=True)
    users, batches = len(prompts), len(found)
    figures = {
        "leaves": np.concatenate(leaves, axis=-2),
        "scores": np.concatenate(scores, axis=-2),
        "users": users,
        "seconds": seconds,
        "model": probe.seconds["model"],
        "scoring": probe.seconds["scoring"],
        "peak": peak,
        "passes": probe.passes / batches,  # every user takes part in every pass of `generate`
        "positions": probe.positions / users,
        "head_rows": probe.head_rows / users,
        "prompts": probe.prompt_positions / users,
    }
    if isinstance(searcher, Search):
        figures |= search_figures(searcher, found, prompts)
    return figures


def search_figures(searcher: Search, found: list, prompts: list[np.ndarray]) -> dict:
    """Return the figures that only our search has."""
    counts = {
        name: torch.cat([part.counts[name] for part in found]).double() for name in found[0].counts
    }
    figures = {
        "passes": counts["passes"].mean().item(),
        "passes_per_token_step": (counts["passes"].sum() / counts["token_steps"].sum()).item(),
        "positions_per_beam_position": (
            counts["positions"].sum() / counts["beam_positions"].sum()
        ).item(),
    }

    if not searcher.model.config.is_encoder_decoder:
        searcher.tree.prefill(prompts[:16])
        tokens, keys = sum(map(len, prompts[:16])), searcher.tree.cache.keys[0]
        heads, width = keys.shape[2:]
        figures["prompt_cache_copies"] = keys.numel() / (tokens * heads * width)

    if searcher.method == "exact":
        leaves = torch.cat([part.leaves[0] for part in found])
        beam_leaves = torch.cat([part.beam_leaves[0] for part in found])
        proven = torch.cat([part.certified[0] for part in found]) >= (leaves >= 0).sum(1)
        hits = (beam_leaves[:, :, None] == leaves[:, None, :]).any(1) & (leaves >= 0)
        figures |= {
            "beam_leaves": beam_leaves.long().numpy(),
            "beam_scores": torch.cat([part.beam_scores[0] for part in found]).numpy(),
            "proof_share": proven.double().mean().item(),
            "beam_recall": hits[proven].sum().item() / max(1, (leaves[proven] >= 0).sum().item()),
        }
    return figures


def check_line(line: Line, measured: dict[str, dict]) -> None:
    """Assert that all beam searches found the same lists, and the exact search nothing worse."""
    expected, differences = measured["beam"], []
    for side, found in measured.items():
        alpha = GRID.index(line.alpha) if side == "grid" else 0
        lists = found["leaves"][alpha], found["scores"][alpha]
        if side == "exact":
            lists = found["beam_leaves"], found["beam_scores"]
            worse = found["scores"][0] < lists[1] - SCORE_TOLERANCE
            assert not worse.any(), (
                f"{line.name}: the exact search lists a lower score than the beam search"
            )

        users = min(found["users"], expected["users"])
        name = f"{line.name}: {side} and beam"
        arrays = (array[:users] for array in (*lists, expected["leaves"][0], expected["scores"][0]))
        differences.append(check_same(name, *arrays))
    print(f"equal lists; scores differ by {max(differences):.1e} at most")


def check_same(name: str, leaves, scores, expected_leaves, expected_scores) -> float:
    """Assert that lists (B, K) are the same, and return the largest difference of their scores.

    Items may change ranks, also with an item behind the end of the list, if their scores are
    within SWAP_GAP.
    """
    assert np.array_equal(leaves < 0, expected_leaves < 0), (
        f"{name} list different numbers of items"
    )

    listed = leaves >= 0
    difference = np.abs(scores - expected_scores)[listed]
    rounding = RELATIVE * np.abs(expected_scores)
    worst = (difference - rounding[listed]).max()
    assert worst <= SCORE_TOLERANCE, f"{name} differ in scores by {difference.max():.1e}"

    for user, rank in np.argwhere(leaves != expected_leaves):
        ranks = np.flatnonzero(expected_leaves[user] == leaves[user, rank])
        other = ranks[0] if len(ranks) else np.flatnonzero(listed[user])[-1]
        gap = abs(expected_scores[user, other] - expected_scores[user, rank])
        assert gap <= SWAP_GAP + rounding[user, rank], (
            f"{name} differ: user {user}, rank {rank + 1}, scores {gap:.1e} apart"
        )
    return float(difference.max())


def in_own_process(function, *arguments):
    """Return what `function` returns in a fork of this process, which shares its memory."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()  # so that a child that dies ends the wait
    result = receiver.recv()
    process.join()
    return result


def run_line(line: Line, runs: Path, generated: Path) -> dict[str, dict]:
    """Measure all sides of a line, check that they agree, print their table."""
    settings = f"{line.beams} beams, batch {line.batch}, penalty {line.penalty:g}"
    print(f"\n{line.name}: {settings}, α {line.alpha:g}", flush=True)
    problem = load(line, runs, generated)
    measured = {side: in_own_process(measure, line, problem, side) for side in line.users}

    rows = []
    for side, found in measured.items():
        model, scoring, seconds = found["model"], found["scoring"], found["seconds"]
        shares = [
            f"{100 * part / seconds:.0f} %" for part in (model, scoring, seconds - model - scoring)
        ]
        counts = [round(found[name], 1) for name in ("passes", "prompts", "positions", "head_rows")]
        rows.append(
            [side, found["users"], rate(found), *counts, *shares, round(found["peak"] / 2**20)]
        )
    header = ["side", "users", "users/s", "passes", "prompt positions", "positions", "lm-head rows"]
    print_table([*header, "model", "scoring", "rest", "peak MiB"], rows)
    for name, value in problem.notes.items():
        print(f"{name}: {value:.2g}")

    beam = measured["beam"]
    print(
        f"beam: {beam['passes_per_token_step']:.0%} of the token steps, "
        f"{beam['positions_per_beam_position']:.2f} × the positions of a search of one token per "
        "step"
    )
    if exact := measured.get("exact"):
        print(
            f"exact: proof for {exact['proof_share']:.1%} of the users, "
            f"{rate(beam) / rate(exact):.2f} × the beam's time; "
            f"beam recall {exact['beam_recall']:.1%}"
        )
    check_line(line, measured)
    return measured


def rate(found: dict) -> float:
    """Return users per second."""
    return found["users"] / found["seconds"]


def write_chart(measured: dict[str, dict], path: Path) -> None:
    """Draw the headline's users per second as bars, as SVG."""
    bars = {side: rate(found) for side, found in measured.items()}
    bars["grid"] *= len(GRID)
    labels = {
        "generate": "generate, dict trie",
        "vectorised": "generate, vectorised",
        "grid": "beam, per α of five",
    }
    scale, lines = 400 / max(bars.values()), []
    for number, (side, value) in enumerate(bars.items()):
        y, width = 40 + 30 * number, max(1, scale * value)
        lines.append(
            f'<text x="150" y="{y + 15}" text-anchor="end">{labels.get(side, side)}</text>'
        )
        lines.append(f'<rect x="160" y="{y}" width="{width:.0f}" height="20" fill="#4a7ab5"/>')
        lines.append(f'<text x="{165 + width:.0f}" y="{y + 15}">{value:.2g}</text>')

    title = (
        f"Users per second: {HEADLINE.beams} beams, prompts of {HEADLINE.prompt} tokens, "
        f"vocabulary {VOCABULARY:,}, CPU"
    )
    size = f'width="640" height="{50 + 30 * len(bars)}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    )
    body = "\n".join(
        [
            head,
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="10" y="22">{title}</text>',
            *lines,
        ]
    )
    path.write_text(body + "\n</svg>\n", encoding="utf-8")


def figures_of(
    headline: dict[str, dict],
    own: dict[str, dict],
    t5: dict[str, dict],
    real: dict[str, dict] | None,
) -> dict[str, float]:
    """Return the closing line's figures; those of the pretrained model where it is there."""
    beam, exact = headline["beam"], own["exact"]
    figures = {
        "users_per_s_vs_generate": rate(beam) / rate(headline["generate"]),
        "users_per_s_vs_generate_vectorised": rate(beam) / rate(headline["vectorised"]),
        "users_per_s_vs_csr_mask": rate(t5["beam"]) / rate(t5["CSR mask"]),
        "passes_per_token_step": beam["passes_per_token_step"],
        "positions_per_beam_position": beam["positions_per_beam_position"],
        "non_model_share": 1 - beam["model"] / beam["seconds"],
        "alpha_grid_cost": rate(beam) / rate(headline["grid"]),
        "prompt_cache_copies": beam["prompt_cache_copies"],
        "exact_proof_share": exact["proof_share"],
        "exact_vs_beam_time": rate(own["beam"]) / rate(exact),
        "beam_recall_of_true_top10": exact["beam_recall"],
    }
    if real:
        beam = real["beam"]
        figures |= {
            "real_users_per_s_vs_generate": rate(beam) / rate(real["generate"]),
            "real_users_per_s_vs_generate_vectorised": rate(beam) / rate(real["vectorised"]),
            "real_non_model_share": 1 - beam["model"] / beam["seconds"],
        }
    return figures


def choose_lines(quick: bool, runs: Path) -> list[Line]:
    """Return the lines to measure: three if `quick`, and none whose model is missing."""
    lines = LINES
    if quick:
        users = {"generate": 4, "vectorised": 8, "beam": 16, "grid": 16}
        own = replace(OWN, users={"beam": 8, "exact": 8}, row_positions=1024)
        lines = [
            replace(HEADLINE, users=users),
            own,
            replace(T5, users={"CSR mask": 64, "beam": 64}),
        ]

    there = {line.source for line in lines if (runs / line.source / "run" / "model").is_dir()}
    if HEADLINE.source not in there:
        print(f"No model in {runs}/{HEADLINE.source}/run (see tools/search_models.sh).")
        print(
            "RANDOM weights on a GENERATED catalogue instead: speeds are comparable, lists and "
            "proofs mean nothing."
        )
        # Without a trained model there is nothing to prove.
        random = {"source": "generated:6000", "row_positions": 256}
        lines = [
            replace(line, **random) if line.source == HEADLINE.source else line for line in lines
        ]

    needed = {"industrial", "instruments", REAL.source} - there
    missing = [line.name for line in lines if line.source in needed]
    if missing:
        print(f"Left out, no model in {runs}: {', '.join(missing)}")
    return [line for line in lines if line.name not in missing]


def main() -> None:
    """Measure the lines, print tables and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the headline on 16 users, proofs on 8, T5 on 64; under 50 s",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=REPOSITORY / "runs" / "search",
        help="what tools/search_models.sh made",
    )
    parser.add_argument(
        "--lines",
        nargs="+",
        metavar="NAME",
        choices=[line.name for line in LINES],
        help="measure these lines alone, and print their tables without the closing figures",
    )
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    lines = choose_lines(arguments.quick, arguments.runs)
    if arguments.lines:
        lines = [line for line in lines if line.name in arguments.lines]
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder)
        generate_codes(generated / "codes", 10_000)
        for source in {line.source for line in lines if line.source.startswith("generated")}:
            (generated / source).mkdir()
            run_fresh(
                str(Path(__file__).with_name("trie.py")),
                "make",
                source.split(":")[1],
                generated / source,
            )
        measured = {line.name: run_line(line, arguments.runs, generated) for line in lines}

    if arguments.lines:
        return
    if not arguments.quick:
        write_chart(measured[HEADLINE.name], REPOSITORY / "docs" / "benchmarks" / "search.svg")
    figures = figures_of(
        measured[HEADLINE.name], measured[OWN.name], measured[T5.name], measured.get(REAL.name)
    )
    finish("search", figures, arguments.quick)


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    # A process that forks must have no thread pool, because its children could not use it.
    torch.set_num_threads(1)
    main()
