"""The search: policies say which trie nodes they need, the model expands them for all users at once, until every list is there.

Letters in shapes: B users, nA values of α, A = B·nA lanes (user-major), K length of a list, M trie nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from igd_ds.backbones.prompt_tree import PromptTree
from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.beam import Beam
from igd_ds.search.best_first import BestFirst
from igd_ds.search.frontier import ExpandedTree, PerUser
from igd_ds.search.scoring import Scoring

METHODS = ("beam", "exact")


@dataclass(frozen=True)
class Limits:
    """pass_positions: tokens packed into one model pass, which bounds its memory. row_positions: tokens of one user, all α and
    the beams before it counted, after which the exact search sends no more and tells what it has proven."""

    pass_positions: int = 512
    row_positions: int = 4096


@dataclass(frozen=True)
class SearchResult:
    """Ranked lists of B users at nA values of α, best first.

    leaves: (nA, B, K) int32, trie nodes that end an item's path; −1 where the user can get fewer than K.
    scores: (nA, B, K) float32, S / n^p in nats (n tokens with EOS); −inf where `leaves` is −1.
    certified: (nA, B) int32, how many first entries are proven to be the best there are; 0 after a beam search.
    missing_bound: (nA, B) float32, no item outside the list scores above it: −inf with a full proof, +inf after a beam search.
    beam_leaves, beam_scores: what the beam search found on the way to the exact lists; None after a beam search.
    counts: by name, (B,) int64. passes: model passes with a position of the user, the prompt's left out. positions: tokens sent
    through the model in them; each also is a row of the language-model head. token_steps, beam_positions: what a beam search of
    one token a step and one α at a time would have made of both, summed over α.
    """

    leaves: torch.Tensor
    scores: torch.Tensor
    certified: torch.Tensor
    missing_bound: torch.Tensor
    beam_leaves: torch.Tensor | None
    beam_scores: torch.Tensor | None
    counts: dict[str, torch.Tensor]


def search(
    tree: PromptTree,
    trie: SearchTrie,
    scoring: Scoring,
    num_beams: int,
    method: str = "beam",
    per_user: PerUser = PerUser(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    any_rank: Callable[[bool], bool] = bool,
) -> SearchResult:
    """Find K good items (beam) or the K best (exact) for each prompt of a prefilled tree, at every α of `scoring`.

    The exact search begins with the beam search, whose K-th score is its first bound, and shares all that the model has
    computed for it.

    Args:
        tree: PromptTree after `prefill`; used up afterwards.
        trie: the catalogue's SearchTrie.
        scoring: what a path scores, on the same device.
        num_beams: K.
        method: name in METHODS.
        per_user: item filter and guidance of this batch's users.
        limits: positions per pass and per row.
        any_rank: tells whether any process must go on, given whether this one must; with ZeRO-3, where all ranks have to make
            the same number of forward passes, give it `distributed.any_rank`.

    Raises:
        ValueError: unknown method, a scoring that the method has no bound for, limits below one beam, or logits that are NaN
            or infinite.
    """
    if method not in METHODS:
        raise UsageError(f"unknown search '{method}'; known: {', '.join(METHODS)}")
    if method == "exact":
        scoring.refuse_exact()
    check_limits(limits, num_beams, method)
    assert len(scoring.gain) == trie.num_nodes, "one gain per node of this trie"
    num_users, device = len(tree.prompt_logits), tree.prompt_logits.device
    expanded = ExpandedTree(tree, trie, scoring, per_user)
    lane_user = torch.arange(num_users, device=device).repeat_interleave(len(scoring.alphas))
    lane_alpha = torch.tensor(scoring.alphas, device=device).repeat(num_users)

    def by_alpha(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(0, (num_users, len(scoring.alphas))).transpose(0, 1)

    beam = Beam(expanded, lane_user, lane_alpha, num_beams)
    _run(beam, expanded, limits, any_rank, retire=method == "beam")
    leaves, scores = beam.leaves, beam.scores
    certified, missing_bound = torch.zeros_like(lane_user), torch.full_like(lane_alpha, torch.inf)
    if method == "exact":
        best = BestFirst(expanded, lane_user, lane_alpha, leaves, scores, limits.row_positions)
        _run(best, expanded, limits, any_rank, retire=True)
        (leaves, scores), missing_bound = best.lists(), best.missing_bound
        certified = ((leaves >= 0) & (scores >= missing_bound[:, None])).sum(1)
    token_steps, beam_positions = (by_alpha(t).sum(0) for t in (beam.token_steps, beam.positions))
    return SearchResult(
        leaves=by_alpha(leaves).int(),
        scores=by_alpha(scores),
        certified=by_alpha(certified).int(),
        missing_bound=by_alpha(missing_bound),
        beam_leaves=by_alpha(beam.leaves).int() if method == "exact" else None,
        beam_scores=by_alpha(beam.scores) if method == "exact" else None,
        counts={
            "passes": expanded.passes,
            "positions": expanded.positions,
            "token_steps": token_steps,
            "beam_positions": beam_positions,
        },
    )


def check_limits(limits: Limits, num_beams: int, method: str) -> None:
    """Raise ValueError for limits that do not let a search of `num_beams` make a step."""
    for flag, value in (
        ("--pass_positions", limits.pass_positions),
        ("--row_positions", limits.row_positions),
    ):
        if value < num_beams and (method == "exact" or flag == "--pass_positions"):
            raise UsageError(
                f"{flag} {value} is less than one position for each of {num_beams} beams: raise it"
            )


def _run(policy, expanded: ExpandedTree, limits: Limits, any_rank, retire: bool) -> None:
    """Expand what `policy` wants until it, on every rank, wants nothing. With `retire`, finished users' caches are freed."""
    cached = len(expanded.tree.prompt_logits)
    policy.advance()
    while any_rank(len(wanted := policy.wanted()) > 0):
        users = policy.open_users()
        if retire and 0 < 2 * len(users) <= cached:
            expanded.tree.retain(users)
            cached = len(users)
        expanded.expand(wanted, limits.pass_positions)
        policy.advance()
