"""The search of one batch: policies ask for trie nodes, the model expands them for all users.

Letters in shapes: B users, nA values of α, A = B·nA user × α pairs (ordered by user), K length of a
list, M trie nodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from igd_ds.config.search import Limits
from igd_ds.contracts import PromptTree
from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.beam import Beam
from igd_ds.search.best_first import BestFirst, BestFirstStream, ProvenLeaf
from igd_ds.search.frontier import Frontier, PerUser
from igd_ds.search.likelihood import leaf_logprobs
from igd_ds.search.scoring import Scoring

METHODS = ("beam", "exact")


class Policy(Protocol):
    """A search policy: selects the nodes to expand and updates its lists from the results."""

    def advance(self) -> None:
        """Make all steps that the expanded nodes allow."""

    def wanted(self) -> np.ndarray:
        """Return the edges (Q,) whose children to expand next. Empty when the search has ended."""

    def open_users(self) -> np.ndarray:
        """Return the users (ascending) whose search has not ended."""


@dataclass(frozen=True)
class SearchResult:
    """Ranked lists of B users at nA values of α, best first; all tensors lie on the CPU."""

    leaves: torch.Tensor
    """int32 (nA, B, K): leaves of the trie; −1 where the user can get fewer than K."""
    scores: torch.Tensor
    """float32 (nA, B, K): S / n^p in nats for n tokens with EOS; −inf where `leaves` is −1."""
    certified: torch.Tensor
    """int32 (nA, B): how many first entries are proven to be the best; 0 after a beam search."""
    missing_bound: torch.Tensor
    """float32 (nA, B): no item outside the list scores above it. −inf if the whole list is proven,
    +inf after a beam search."""
    beam_leaves: torch.Tensor | None
    """int32 (nA, B, K): the beam search's list, from which the exact search began; None after a
    beam search, and where the exact search needed none."""
    beam_scores: torch.Tensor | None
    """float32 (nA, B, K): its scores."""
    target_logprobs: torch.Tensor | None
    """float32 (B,): Σ_t log p(y_t) of the users' targets in nats, if they were given."""
    counts: dict[str, torch.Tensor]
    """int64 (B,) by name. `passes`: passes through the model with a token of the user, without the
    prompt's pass. `positions`: tokens of the user in these passes, each of which also is a row of
    the language-model head. `token_steps` and `beam_positions`: passes and tokens of a beam search
    that makes one token per step and one α at a time, summed over α; not there where no beam search
    was made."""


def search(
    tree: PromptTree,
    trie: SearchTrie,
    scoring: Scoring,
    num_beams: int,
    method: str = "beam",
    per_user: PerUser = PerUser(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    any_rank: Callable[[bool], bool] = bool,
    targets: np.ndarray | None = None,
) -> SearchResult:
    """Find K good items (beam) or the K best items (exact) per prompt, at every α of `scoring`.

    The exact search begins with a beam search, whose K-th score is its first bound, and both share
    everything that the model computes. Where scores are log-probabilities, the exact search needs
    no such bound and begins at the root.

    Args:
        tree: a prompt tree after `prefill`. Prefill it again before another search.
        trie: the catalogue's trie, on the CPU.
        scoring: how a path is scored.
        num_beams: K.
        method: a name in METHODS.
        per_user: item filter and guidance of this batch's users.
        limits: most positions per pass and per row.
        any_rank: tells whether any process must go on, given whether this one must. With ZeRO-3 all
            ranks have to make the same number of forward passes: give it `distributed.any_rank`.
        targets: int (B,), a leaf per user, of which the log-probability is wanted too. That takes
            passes more, usually one, which do not count.

    Raises:
        UsageError: an unknown method, a scoring under which the method has no bounds, limits below
            one beam, or logits that are NaN or infinite.

    Example:
        >>> tree.prefill(prompts)
        >>> result = search(tree, trie, scoring, num_beams=10)
        >>> result.leaves[0, 2]  # the list of user 2 at the first α
    """
    if method not in METHODS:
        raise UsageError(f"unknown search '{method}'; known: {', '.join(METHODS)}")
    if method == "exact":
        scoring.refuse_exact()
    check_limits(limits, num_beams, method)
    assert len(scoring.gain) == trie.num_nodes, "one gain per node of this trie"

    target_logprobs = None
    if targets is not None:
        target_logprobs = leaf_logprobs(tree, trie, scoring, targets, limits.pass_positions)
    num_users, num_alphas = len(tree.prompt_logits), len(scoring.alphas)
    frontier = Frontier(tree, trie, scoring, per_user)
    pair_user = np.repeat(np.arange(num_users), num_alphas)
    pair_alpha = np.tile(np.array(scoring.alphas, np.float32), num_users)
    counts = {
        "passes": torch.from_numpy(frontier.passes),
        "positions": torch.from_numpy(frontier.positions),
    }

    def by_alpha(values: np.ndarray) -> torch.Tensor:
        """Turn (A, …) into (nA, B, …)."""
        return torch.from_numpy(values).unflatten(0, (num_users, num_alphas)).transpose(0, 1)

    shape = len(pair_user), num_beams
    leaves, scores = np.full(shape, -1), np.full(shape, -np.inf, np.float32)
    certified = np.zeros_like(pair_user)
    missing_bound = np.full_like(pair_alpha, np.inf)

    beam = None
    if method == "beam" or not frontier.is_probability:
        beam = Beam(frontier, pair_user, pair_alpha, num_beams)
        for _ in _passes(beam, frontier, limits, any_rank, retire=method == "beam"):
            pass
        leaves, scores = beam.leaves, beam.scores
        counts["token_steps"] = by_alpha(beam.token_steps).sum(0)
        counts["beam_positions"] = by_alpha(beam.positions).sum(0)

    if method == "exact":
        best = BestFirst(frontier, pair_user, pair_alpha, leaves, scores, limits)
        for _ in _passes(best, frontier, limits, any_rank, retire=True):
            pass
        leaves, scores = best.lists()
        missing_bound = best.missing_bound
        certified = ((leaves >= 0) & (scores >= missing_bound[:, None])).sum(1)
    else:
        beam = None  # its lists are the result

    return SearchResult(
        leaves=by_alpha(leaves).int(),
        scores=by_alpha(scores),
        certified=by_alpha(certified).int(),
        missing_bound=by_alpha(missing_bound),
        beam_leaves=None if beam is None else by_alpha(beam.leaves).int(),
        beam_scores=None if beam is None else by_alpha(beam.scores),
        target_logprobs=target_logprobs,
        counts=counts,
    )


def stream(
    tree: PromptTree,
    trie: SearchTrie,
    scoring: Scoring,
    per_user: PerUser = PerUser(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
) -> Iterator[list[ProvenLeaf]]:
    """Find the best leaves of one prompt one by one, by best-first search, in their true order.

    Nothing is searched beyond what the caller takes.

    Args:
        tree: a prompt tree after `prefill` with one prompt.
        trie: the catalogue's trie, on the CPU.
        scoring: how a path is scored, at one α.
        per_user: item filter and guidance of the user.
        limits: most positions per pass, and of the user; then the stream ends.

    Yields:
        The leaves that each pass through the model has proven, best first; often none.

    Raises:
        UsageError: a scoring without bounds, or logits that are NaN or infinite.

    Example:
        >>> tree.prefill([prompt])
        >>> best = next(leaf for proven in stream(tree, trie, scoring) for leaf in proven)
    """
    scoring.refuse_exact()
    (alpha,) = scoring.alphas
    frontier = Frontier(tree, trie, scoring, per_user)
    best = BestFirstStream(frontier, alpha, limits)
    for _ in _passes(best, frontier, limits, bool, retire=False):
        yield best.take_proven()
    yield best.take_proven()


def check_limits(limits: Limits, num_beams: int, method: str) -> None:
    """Raise UsageError for limits that do not let a search of `num_beams` beams make a step."""
    values = {"--pass_positions": limits.pass_positions}
    if method == "exact":
        values["--row_positions"] = limits.row_positions
    for flag, value in values.items():
        if value < num_beams:
            raise UsageError(
                f"{flag} {value} is less than one position for each of {num_beams} beams: raise it"
            )


def _passes(
    policy: Policy,
    frontier: Frontier,
    limits: Limits,
    any_rank: Callable[[bool], bool],
    retire: bool,
) -> Iterator[None]:
    """Expand the nodes that `policy` wants, until no rank wants any; yield before each pass.

    With `retire`, the caches of users whose search has ended are freed each time that at least half
    of the cached users have ended.
    """
    cached = len(frontier.tree.prompt_logits)
    policy.advance()
    while any_rank(len(wanted := policy.wanted()) > 0):
        yield
        users = policy.open_users()
        if retire and 0 < 2 * len(users) <= cached:
            frontier.tree.retain(torch.from_numpy(users))
            cached = len(users)
        frontier.expand(wanted, limits.pass_positions)
        policy.advance()
