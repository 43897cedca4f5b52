"""Recommend with a model that `igd baseline` saved: it scores all items instead of searching.

    recommender = Recommender.load("runs/sasrec")  # a BaselineRecommender

Letters in shapes: B users, K length of a list, N items, L leaves of the trie.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds.baselines.leaves import Leaves, build_catalogue
from igd_ds.baselines.saved import is_baseline, read_description
from igd_ds.baselines.sequential import load_model
from igd_ds.config.model import ModelSource
from igd_ds.config.search import Limits
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.contracts import Likelihood
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.evaluation.full_ranking import best_leaves
from igd_ds.evaluation.recommender import Ids, RankedList, Recommendation, Recommender
from igd_ds.items.ids import SOURCE
from igd_ds.search.engine import SearchResult
from igd_ds.search.frontier import PerUser
from igd_ds.search.scoring import Scoring

USED = {
    "model", "dataset", "output_dir", "split", "num_beams", "num_rows", "batch_size", "seed",
    "item_filter", "ids", "exclude_seen", "timeout", "master_port", "quiet",
}  # fmt: skip
"""Settings of `igd eval` that mean something for a baseline; the others are about a search."""


def open_recommender(source: ModelSource, device: torch.device | str | None = None) -> Recommender:
    """Return the Recommender of a trained model, generative or a baseline, without its weights."""
    kind = BaselineRecommender if is_baseline(source.model) else Recommender
    return kind(source, device)


class BaselineRecommender(Recommender):
    """A trained baseline with its dataset and catalogue; see Recommender.

    Every list is proven, because every item is scored: log p of the item, or of the items with its
    title or semantic ID together, in nats.

    Raises:
        UsageError: the model was trained on another dataset, or a setting means nothing for it.
    """

    def __init__(self, source: ModelSource, device: torch.device | str | None = None):
        ModelSource.check(source)
        description = read_description(source.model)
        self.name: str = description["recommender"]
        self.max_history = description["form"].get("max_history")
        given = {
            f"--{entry.name}": getattr(source, entry.name) != entry.default
            for entry in dataclasses.fields(source)
            if entry.name not in USED
        }
        self._refuse(given)

        dataset = InteractionDataset.load(source.dataset)
        if description["dataset"] != dataset.fingerprint:
            raise UsageError(
                f"--dataset {source.dataset} is not the dataset that {source.model} was trained "
                "on, or another version of it"
            )
        self.source, self.base_weights, self.max_length = source, "", 0
        stored = build_catalogue(dataset, _item_kind(Path(source.model), description))
        self._set_up(dataset, stored, Likelihood(), device)
        self.leaves = Leaves.build(stored.trie, self.device)

    def load_weights(self) -> None:
        """Load the model, once; nothing can be ranked before."""
        if self.model is None:
            self.model = load_model(self.source.model).to(self.device)

    def search(
        self,
        histories: Sequence[np.ndarray],
        scoring: Scoring,
        num_beams: int,
        method: str,
        per_user: PerUser,
        limits: Limits,
        targets: np.ndarray | None = None,
    ) -> SearchResult:
        """Rank the catalogue for one batch of histories.

        Args:
            histories: dense item ids, oldest first; the model reads as many of the last ones as the
                longest history of its dataset has.
            num_beams: K.
            per_user: may have an item filter.
            targets: int (B,), a leaf per user, of which the log-probability is wanted too.
            scoring, method, limits: of a search; not used.
        """
        assert self.model is not None, "call load_weights() first"
        if self.max_history is not None:
            histories = [history[-self.max_history :] for history in histories]
        lengths = [len(history) for history in histories]
        padded = torch.zeros((len(histories), max(lengths)), dtype=torch.int64)
        for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
            padded[row, :length] = torch.from_numpy(history.astype(np.int64))
        last = torch.arange(len(histories)) * max(lengths) + torch.tensor(lengths) - 1

        with self._one_at_a_time:
            of_items = self.model.log_probabilities(padded.to(self.device), last.to(self.device))
        length = min(num_beams, self.num_leaves)
        log_p, columns = best_leaves(self.leaves, of_items, length, per_user.item_filter)

        target_logprobs = None
        if targets is not None:
            column = torch.from_numpy(np.searchsorted(self.leaves.nodes, targets))
            of_leaves = self.leaves.log_probabilities(of_items).cpu()
            target_logprobs = of_leaves.gather(1, column[:, None])[:, 0].float()

        shape = (len(histories), num_beams)
        leaves, scores = torch.full(shape, -1, dtype=torch.int32), torch.full(shape, -torch.inf)
        scores[:, :length] = log_p.cpu()
        nodes = torch.from_numpy(self.leaves.nodes)[columns.cpu()].int()
        leaves[:, :length] = nodes.where(scores[:, :length] > -torch.inf, -1)
        return SearchResult(
            leaves=leaves[None],
            scores=scores[None],
            certified=(leaves >= 0).sum(1)[None].int(),
            missing_bound=torch.full((1, len(histories)), -torch.inf),
            beam_leaves=None,
            beam_scores=None,
            target_logprobs=target_logprobs,
            counts={},
        )

    def recommend(
        self,
        histories: Sequence[Ids],
        k: int = 10,
        alpha: float | None = None,
        search: str | None = None,
        allow: Sequence[Ids | None] | None = None,
        deny: Sequence[Ids | None] | None = None,
        guidance: tuple[Any, float] | None = None,
        guidance_ids: Ids | None = None,
        ids: str = SOURCE,
        exclude_seen: str = "auto",
        **scoring: Any,
    ) -> list[RankedList]:
        """Return one ranked list per history, see `Recommender.recommend`.

        Raises:
            UsageError: as there; or `alpha`, `search`, `guidance` or another option of a search.
        """
        options = {"alpha": alpha, "search": search, "guidance": guidance} | scoring
        options["guidance_ids"] = guidance_ids
        self._refuse({name: value is not None for name, value in options.items()})
        return super().recommend(
            histories, k, allow=allow, deny=deny, ids=ids, exclude_seen=exclude_seen
        )

    def stream(
        self,
        history: Ids,
        alpha: float | None = None,
        allow: Ids | None = None,
        deny: Ids | None = None,
        positions: int | None = None,
        ids: str = SOURCE,
        exclude_seen: str = "auto",
        **scoring: Any,
    ) -> Iterator[Recommendation]:
        """Return an iterator over the whole ranking, see `Recommender.stream`.

        Raises:
            UsageError: as there; or `alpha`, `positions` or another option of a search.
        """
        options = {"alpha": alpha, "positions": positions} | scoring
        self._refuse({name: value is not None for name, value in options.items()})
        (ranked,) = self.recommend(
            [history],
            self.num_leaves,
            allow=None if allow is None else [allow],
            deny=None if deny is None else [deny],
            ids=ids,
            exclude_seen=exclude_seen,
        )
        bounds = [after.score for _, after in pairwise(ranked)] + [-np.inf]
        return (replace(found, bound=bound) for found, bound in zip(ranked, bounds, strict=True))

    def _refuse(self, given: dict[str, bool]) -> None:
        """Raise UsageError for the first option that is given."""
        if names := [name for name, is_given in given.items() if is_given]:
            raise UsageError(f"{names[0]} has no effect on {self.name}: leave it out")


def _item_kind(model: Path, description: dict[str, Any]) -> str:
    """Return what the items of a baseline's run are written as.

    Models of earlier versions do not say so; the run's config.yaml does.
    """
    settings = model.resolve().parent / "config.yaml"
    recorded = read_yaml_settings(settings) if settings.is_file() else {}
    kind: str = description.get("item_kind") or recorded.get("item_kind", "auto")
    return kind
