"""Recommend for histories with a trained run: the API, and the search under the evaluator.

    recommender = Recommender.load("runs/demo/igd")
    for recommendation in recommender.recommend([["B0031", "B0007"]], k=10, alpha=0.2)[0]:
        print(recommendation.rank, recommendation.source_ids, recommendation.score)

A history holds the items that a user has met, oldest first, by the ids that the dataset's source
gives them: texts, or whole numbers. See `igd_ds.items.ids` for the other language, dense item ids.
"""

import functools
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.backbones import backbone_of, read_model_config
from igd_ds.backbones.saved import (
    DESCRIPTION_FILE,
    Origin,
    base_of,
    check_model,
    describe,
    likelihood_of,
)
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.config.items import EXCLUDE_SEEN
from igd_ds.config.model import ModelSource
from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.contracts import Backbone, Likelihood
from igd_ds.data.batches import length_batches
from igd_ds.data.cut_titles import with_cut_titles
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.data.seen_items import with_seen
from igd_ds.errors import UsageError
from igd_ds.items.ids import SOURCE, SPACES, ItemId, ItemIds, names_of
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue, load_catalogue
from igd_ds.search.best_first import ProvenLeaf
from igd_ds.search.engine import SearchResult, search, stream
from igd_ds.search.filters import Guidance, ItemFilter, ItemRanges, items_under
from igd_ds.search.frontier import PerUser
from igd_ds.search.scoring import Scoring

Ids = Iterable[ItemId] | np.ndarray
"""A flat list of ids."""

SCORINGS_KEPT = 8
"""Scoring options whose arrays stay in memory. A service has few; a sweep over α makes many."""


@dataclass(frozen=True)
class Recommendation:
    """One place of a ranked list."""

    rank: int
    """1 is the best."""
    item_ids: tuple[int, ...]
    """Dense ids of the item, or of all items with this token path that the user may get: the model
    cannot tell them apart."""
    source_ids: tuple[str, ...]
    """The source's ids of the same items."""
    title: str | None
    """Title of the first of them; None where the dataset has semantic IDs alone."""
    score: float
    """S / n^p in nats, n tokens with EOS."""
    probability: float | None
    """p(item | history), of all items with this token path together, where the score is its log:
    under the masked softmax, with α = 0 and without length penalty, prior and guidance. Else
    None."""
    certified: bool
    """Whether this place is proven: no item outside the list scores higher. False after a beam
    search."""
    bound: float | None = None
    """Of a stream: nothing that follows scores above it, in nats; −inf if nothing follows."""


class RankedList(list[Recommendation]):
    """A user's Recommendations, best first.

    Attributes:
        short: fewer than k items are available, because of a filter, guidance or the catalogue's
            size.
        coverage: the probability that the listed items have together; None where they have none.
    """

    def __init__(self, recommendations: Sequence[Recommendation], short: bool):
        super().__init__(recommendations)
        self.short = short
        probabilities = [place.probability for place in recommendations]
        known = [probability for probability in probabilities if probability is not None]
        self.coverage = math.fsum(known) if len(known) == len(probabilities) else None


class Recommender:
    """A trained model with its dataset, catalogue, prompt and search trie.

    `load` makes one; or the constructor makes one without weights and `load_weights` adds them.
    Threads may share a Recommender: their searches take turns.

    Args:
        source: which model and dataset to load, and how.
        device: where to search; None: this process's GPU, or the CPU where there is none.

    Attributes:
        dataset, tokenizer, stored, prompts: dataset, tokenizer, catalogue and prompt builder of the
            run.
        ids: the source ids of the dataset's items.
        base_weights: the sha256 of an adapter's base weights; "" for full weights.
        likelihood: the softmax that the model was trained with, used where the options say "auto".
        ranges: the catalogue's ItemRanges, which item filters and guidance are built with.
        batch_size: histories that `recommend` searches at once; may be set.
        limits: positions per model pass and per user, for `recommend`; may be set.

    Raises:
        UsageError: the folder holds no trained model; a file of it changed since it was saved;
            an adapter's base has other weights than in training; tokenizer, catalogue and dataset
            do not belong together; or the prompt's frame does not fit `max_length`.
    """

    def __init__(self, source: ModelSource, device: torch.device | str | None = None):
        ModelSource.check(source)  # an EvalConfig is a source too, and checked when it was parsed
        self.source, self.description = source, describe(source.model)
        self.max_length = source.max_length or self.description["max_length"]
        if self.max_length > self.description["max_length"]:
            raise UsageError(
                f"--max_length {source.max_length} exceeds the {self.description['max_length']} "
                "that the model was trained with"
            )

        self.base_weights = distributed.on_main(lambda: check_model(source))

        # What the model reads and writes.
        dataset = InteractionDataset.load(source.dataset)
        self.tokenizer = load_tokenizer(source.model, source.trust_remote_code)
        # Items are written as in training; what is recommended is shown with its whole title.
        as_written = with_cut_titles(
            dataset, self.tokenizer, self.description.get("max_title_tokens", 0)
        )
        stored = load_catalogue(Path(source.model) / "catalogue", self.tokenizer, as_written)
        catalogue = stored.catalogue
        template = Template.from_dict(
            self.description["prompt"], f"{source.model}/{DESCRIPTION_FILE}"
        )
        budget = self.max_length - catalogue.max_length
        self.prompts = PromptBuilder.build(
            template, self.tokenizer, as_written, catalogue.kind, budget
        )
        self.max_history: int | None = dataset.info["parameters"].get("max_history") or None

        self._set_up(dataset, stored, likelihood_of(self.description), device)
        self.trie = SearchTrie.build(stored.trie)
        self._backbone: Backbone | None = None

    def _set_up(
        self,
        dataset: InteractionDataset,
        stored: StoredCatalogue,
        likelihood: Likelihood,
        device: torch.device | str | None,
    ) -> None:
        """Set what any model ranks with: the items, their ids, and how their paths are scored."""
        self.device = torch.device(device) if device is not None else distributed.device()
        self.dataset, self.stored, self.likelihood = dataset, stored, likelihood
        self.ids = ItemIds.read(dataset.folder)
        self.num_leaves = int(np.count_nonzero(self.stored.trie.is_leaf))
        self.ranges = ItemRanges.build(self.stored.trie)
        self.batch_size, self.limits = 16, Limits()
        self._one_at_a_time = threading.Lock()
        self.model: Any = None
        self.scoring = functools.lru_cache(SCORINGS_KEPT)(self._build_scoring)

    @classmethod
    def load(
        cls,
        run: str | Path,
        dataset: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: str = "auto",
        base_model: str = "",
        trust_remote_code: bool = False,
    ) -> "Recommender":
        """Load what igd train or igd baseline left in a run folder, weights included.

        Args:
            run: the run folder, or the model/ folder in it.
            dataset: the dataset folder that the run was trained on; None: where the run's
                config.yaml says it lies.
            device, dtype, base_model, trust_remote_code: see Recommender and ModelSource.

        Raises:
            UsageError: as Recommender; no dataset folder is known; unknown dtype.

        Example:
            >>> recommender = Recommender.load("runs/demo/igd")
        """
        model = Path(run)
        if (model / "model").is_dir():
            run, model = model, model / "model"
        else:
            run = model.resolve().parent
        source = ModelSource(
            model=str(model),
            dataset=str(dataset_of(run) if dataset is None else dataset),
            dtype=dtype,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
        )
        from igd_ds.evaluation.baseline_recommender import open_recommender  # imports this module

        recommender = open_recommender(source, device)
        recommender.load_weights()
        return recommender

    def load_weights(self) -> None:
        """Load the model, once; nothing can be searched before."""
        if self.model is None:
            weights = base_of(self.source) or Origin(self.source.model)
            model_config = read_model_config(
                weights.name, self.source.trust_remote_code, weights.revision
            )
            self._backbone = backbone_of(model_config)
            load_in_4bit = self.description["load_in_4bit"]
            self.model = self._backbone.load(self.source, load_in_4bit, self.device)

    def _build_scoring(self, options: ScoringOptions) -> Scoring:
        """Return the Scoring of some options; `scoring` keeps the last few."""
        return Scoring.build(self.stored.trie, self.stored.gain, options, self.likelihood)

    def per_user(
        self,
        labels: Sequence[str],
        allow: Sequence[Iterable[int] | None] | None = None,
        deny: Sequence[Iterable[int] | None] | None = None,
        guidance: tuple[np.ndarray, float] | None = None,
    ) -> PerUser:
        """Return the item filter and the guidance of a batch's users.

        With both, the guide's probabilities are restricted to the allowed items: the mass of denied
        ones would lead hypotheses to where nothing can be recommended.

        Args:
            labels: what error messages call the users.
            allow, deny: dense item ids, per user or None.
            guidance: floats (users, N), column i is item i's, and the weight.

        Raises:
            UsageError: as ItemFilter and Guidance, or a user for whom the two together leave
                nothing.
        """
        item_filter = guide = None
        if allow is not None or deny is not None:
            item_filter = ItemFilter.build(self.ranges, len(labels), allow, deny, labels)
        if guidance is not None:
            q, weight = guidance
            if item_filter is not None and q.shape == (len(labels), self.dataset.num_items):
                q = self._without_denied(np.array(q), item_filter, labels)
            guide = Guidance.build(self.ranges, q, weight, labels)
        return PerUser(item_filter, guide)

    def _without_denied(
        self, q: np.ndarray, item_filter: ItemFilter, labels: Sequence[str]
    ) -> np.ndarray:
        """Set q (B, N) to 0, in place, where the user may not get the item."""
        items = torch.arange(q.shape[1])
        for user, row in enumerate(q):
            allowed = item_filter.allows_items(torch.full_like(items, user), items)
            row[~allowed.numpy()] = 0
            if not row.any():
                raise UsageError(
                    f"{labels[user]}: item filter and guidance together leave nothing; loosen one "
                    "of them"
                )
        return q

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
        """Rank the catalogue for one batch of histories, at every α of `scoring`.

        Args:
            histories: dense item ids, oldest first. The oldest items are dropped where there are
                more than a history of the dataset has, or more than the prompt holds.
            scoring, num_beams, method, per_user, limits, targets: see
                `igd_ds.search.engine.search`.
        """
        assert self._backbone is not None, "call load_weights() first"
        with self._one_at_a_time:  # a search changes how the model attends while it lasts
            tree = self._backbone.prompt_tree(self.model, scoring.output_tokens(self.trie))
            tree.prefill([self._prompt(history) for history in histories])
            return search(
                tree, self.trie, scoring, num_beams, method, per_user, limits, targets=targets
            )

    def _prompt(self, history: np.ndarray) -> np.ndarray:
        """Return the prompt's tokens; as in training it has at most `max_history` items."""
        if self.max_history is not None:
            history = history[-self.max_history :]
        return self.prompts.encode(history)

    def recommend(
        self,
        histories: Sequence[Ids],
        k: int = 10,
        alpha: float = 0.0,
        search: str = "auto",
        allow: Sequence[Ids | None] | None = None,
        deny: Sequence[Ids | None] | None = None,
        guidance: tuple[Any, float] | None = None,
        guidance_ids: Ids | None = None,
        ids: str = SOURCE,
        exclude_seen: str = "auto",
        **scoring: Any,
    ) -> list[RankedList]:
        """Return one ranked list per history. No list depends on the other histories.

        Args:
            histories: per user the items met so far, oldest first, at least one. The model reads
                the last ones, as many as a history of its dataset may have (--max_history).
            k: how many items to list; a user who can get fewer gets a list with `short` set.
            alpha: α in [0, 1], strength of decisiveness calibration (IGD Eq. 9); 0 is plain beam
                search.
            search: "beam", or "exact" for the provably best items. "auto": exact where scores are
                item probabilities, without guidance; else beam.
            allow: per user the only items to choose from, or None for all items.
            deny: per user the items to leave out (out of stock, say), or None for none.
            guidance: a second scorer's item probabilities, floats (users, columns), and the weight
                of its log-probabilities; see Guidance.
            guidance_ids: the item of each column of `guidance`; other columns are ignored. None:
                the names of the columns, if it is a data frame. An array without names is taken
                only where the order cannot be mistaken: `ids` is "dense", or the dataset has kept
                the source's numbers.
            ids: the language of `histories`, `allow`, `deny` and `guidance_ids`. "source": the
                source's ids, as texts or whole numbers. "dense": item ids of the dataset folder.
            exclude_seen: "yes" leaves the items of a user's history out of the list, "no" keeps
                them. "auto" leaves them out if they are rare among the dataset's training targets
                (`dataset.repeat_rate`).
            **scoring: other fields of ScoringOptions, such as length_penalty.

        Raises:
            UsageError: names the user (position in `histories`) with an empty history, an item that
                is not in the catalogue, or nothing left to recommend; or nothing says which item a
                column of `guidance` is, k < 1, an option out of its range, `limits` below one
                position per item of the list.

        Example:
            >>> history = ["B0031", "B0007"]
            >>> recommender.recommend([history], k=10, exclude_seen="yes")[0][0].source_ids
            ('B0019',)
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UsageError(f"k must be a whole number and at least 1, found {k}")
        if ids not in SPACES:
            raise UsageError(f"ids is one of {', '.join(SPACES)}, found {ids!r}")
        if guidance_ids is not None and guidance is None:
            raise UsageError("guidance_ids has no effect without guidance: leave it out")

        # From the outer language of ids to the dense one.
        users = self._histories(histories, ids)
        labels = [f"histories[{user}]" for user in range(len(users))]
        allowed = self._lists("allow", allow, len(users), ids)
        denied = self._lists("deny", deny, len(users), ids)
        if self._excludes_seen(exclude_seen):
            denied = with_seen(denied, users)
        q, weight = (None, 0.0) if guidance is None else guidance
        if q is not None:
            q = self._guidance(q, guidance_ids, len(users), ids)

        options = self.scoring(ScoringOptions(alpha=(alpha,), **scoring))
        method = options.method(search, guided=q is not None)
        k = int(k)
        width = min(k, self.num_leaves)
        lengths = np.array([len(history) for history in users])
        lists: dict[int, RankedList] = {}
        for batch in length_batches(lengths, self.batch_size):
            per_user = self.per_user(
                [labels[user] for user in batch],
                None if allowed is None else [allowed[user] for user in batch],
                None if denied is None else [denied[user] for user in batch],
                None if q is None else (q[batch], weight),
            )
            histories_of_batch = [users[user] for user in batch]
            found = self.search(histories_of_batch, options, width, method, per_user, self.limits)
            has_probabilities = options.is_probability and per_user.guidance is None
            ranked = self._ranked_lists(found, k, per_user.item_filter, has_probabilities)
            lists |= zip(batch.tolist(), ranked, strict=True)
        return [lists[user] for user in range(len(users))]

    def stream(
        self,
        history: Ids,
        alpha: float = 0.0,
        allow: Ids | None = None,
        deny: Ids | None = None,
        positions: int | None = None,
        ids: str = SOURCE,
        exclude_seen: str = "auto",
        **scoring: Any,
    ) -> Iterator[Recommendation]:
        """Return an iterator of Recommendations, one by one in their true order.

        Nobody has to say how many are wanted. Each is returned as soon as it is proven that nothing
        which follows scores higher; the model reads only what that takes. The first k are the list
        of `recommend(..., k, search="exact")`, except that equal scores may change places. Between
        two items nothing is held: other searches may run, and the caller may stop at any time.

        Args:
            history: the items met so far, oldest first, at least one.
            alpha, ids, exclude_seen, **scoring: see `recommend`.
            allow: the only items to choose from, or None for all items.
            deny: the items to leave out, or None for none.
            positions: most tokens to send through the model behind the prompt (the last pass may
                exceed them). The iterator then ends with what is proven. None: no limit.

        Raises:
            UsageError: at once, not with the first item: an empty history, an item that is not in
                the catalogue, nothing left to recommend, an option out of its range, a decoding
                rule without bounds ("pooled"), or `positions` < 1.

        Example:
            >>> for found in recommender.stream(["B0031", "B0007"]):
            ...     if in_stock(found.source_ids[0]):
            ...         break
        """
        if positions is not None and positions < 1:
            raise UsageError(
                f"positions must be at least 1, or None for no limit, found {positions}"
            )
        if ids not in SPACES:
            raise UsageError(f"ids is one of {', '.join(SPACES)}, found {ids!r}")
        options = self.scoring(ScoringOptions(alpha=(alpha,), **scoring))
        options.refuse_exact('use recommend(search="beam"), or a rule per node')

        (dense,) = self._histories([history], ids)
        allowed = self._lists("allow", None if allow is None else [allow], 1, ids)
        denied = self._lists("deny", None if deny is None else [deny], 1, ids)
        if self._excludes_seen(exclude_seen):
            denied = with_seen(denied, [dense])
        per_user = self.per_user(["histories[0]"], allowed, denied)
        limits = Limits(
            pass_positions=self.limits.pass_positions, row_positions=positions or sys.maxsize
        )
        return self._streamed(dense, options, per_user, limits)

    def _streamed(
        self, history: np.ndarray, scoring: Scoring, per_user: PerUser, limits: Limits
    ) -> Iterator[Recommendation]:
        """Yield the Recommendations of `stream`; other searches may run between two passes."""
        assert self._backbone is not None, "call load_weights() first"
        with self._one_at_a_time:
            tree = self._backbone.prompt_tree(self.model, scoring.output_tokens(self.trie))
            tree.prefill([self._prompt(history)])
            passes = stream(tree, self.trie, scoring, per_user, limits)

        rank = 0
        while True:
            with self._one_at_a_time:
                proven = next(passes, None)
            if proven is None:
                return
            for found in proven:
                rank += 1
                yield self._recommendation(
                    rank, found, per_user.item_filter, scoring.is_probability
                )

    def _recommendation(
        self, rank: int, found: ProvenLeaf, item_filter: ItemFilter | None, has_probability: bool
    ) -> Recommendation:
        """Return a streamed leaf as a Recommendation."""
        leaf, user = np.array([found.leaf]), np.zeros(1, np.int64)
        items, _ = items_under(self.stored.trie, leaf, user, item_filter)
        return Recommendation(
            rank=rank,
            item_ids=tuple(items.tolist()),
            source_ids=tuple(self.ids.source_ids[item] for item in items),
            title=self.dataset.titles[items[0]],
            score=found.score,
            probability=math.exp(found.score) if has_probability else None,
            certified=True,
            bound=found.bound,
        )

    def _excludes_seen(self, asked: str) -> bool:
        """Return whether lists leave the items of the history out, or raise UsageError."""
        if asked not in EXCLUDE_SEEN:
            raise UsageError(f"exclude_seen is one of {', '.join(EXCLUDE_SEEN)}, found {asked!r}")
        return self.dataset.excludes_seen(asked)

    def _histories(self, histories: Sequence[Ids], ids: str) -> list[np.ndarray]:
        """Return the histories as dense item ids, or raise UsageError that names the user."""
        dense = [
            self.ids.item_ids(history, f"histories[{user}]", ids)
            for user, history in enumerate(histories)
        ]
        for user, history in enumerate(dense):
            if not history.size:
                raise UsageError(
                    f"histories[{user}]: the history is empty; leave the user out, or give at "
                    "least one item"
                )
        return dense

    def _lists(
        self, name: str, lists: Sequence[Ids | None] | None, num_users: int, ids: str
    ) -> list[np.ndarray | None] | None:
        """Return lists of `allow` or `deny` as dense item ids, or raise UsageError."""
        if lists is None:
            return None
        _check_length(name, lists, num_users)
        return [
            None if entries is None else self.ids.item_ids(entries, f"{name}[{user}]", ids)
            for user, entries in enumerate(lists)
        ]

    def _guidance(self, q: Any, guidance_ids: Ids | None, num_users: int, ids: str) -> np.ndarray:
        """Return probabilities as float64 (users, N), column i is item i's, or raise UsageError."""
        if guidance_ids is None:
            guidance_ids = getattr(q, "columns", None)  # of a data frame
            if type(guidance_ids).__name__ == "RangeIndex":  # pandas counts columns without names
                guidance_ids = None
        q = np.asarray(q, dtype=np.float64)
        _check_length("guidance", q, num_users)

        if guidance_ids is None:
            if ids == SOURCE:
                remedy = "give guidance_ids=, the source id of each column"
                self.ids.refuse_unnamed("guidance", "column", remedy)
            return q
        if q.ndim != 2:
            raise UsageError(f"guidance has one row per history, found shape {q.shape}")
        names = names_of(guidance_ids, "guidance_ids")
        return q[:, self.ids.places_in(names, q.shape[1], "guidance_ids", "column", ids)]

    def _ranked_lists(
        self,
        found: SearchResult,
        k: int,
        item_filter: ItemFilter | None,
        has_probabilities: bool,
    ) -> list[RankedList]:
        """Return the users' lists at the search's only α."""
        leaves = found.leaves[0].numpy()
        scores = found.scores[0].numpy()
        certified = found.certified[0].numpy()
        user, place = np.nonzero(leaves >= 0)
        items, count = items_under(self.stored.trie, leaves[user, place], user, item_filter)
        items_of_place = np.split(items, count.cumsum()[:-1])

        lists: list[list[Recommendation]] = [[] for _ in leaves]
        for u, p, ids in zip(user, place, items_of_place, strict=True):
            lists[u].append(
                Recommendation(
                    rank=int(p) + 1,
                    item_ids=tuple(ids.tolist()),
                    source_ids=tuple(self.ids.source_ids[item] for item in ids),
                    title=self.dataset.titles[ids[0]],
                    score=float(scores[u, p]),
                    probability=math.exp(scores[u, p]) if has_probabilities else None,
                    certified=bool(p < certified[u]),
                )
            )
        return [RankedList(entries, short=len(entries) < k) for entries in lists]


def _check_length(name: str, entries: Sized, num_users: int) -> None:
    """Raise UsageError unless there is one entry per history."""
    if len(entries) != num_users:
        raise UsageError(
            f"{name} takes one entry per history: found {len(entries)} for {num_users}"
        )


def dataset_of(run: Path) -> Path:
    """Return the dataset folder that a run's config.yaml names."""
    settings = run / "config.yaml"
    if not settings.is_file():
        raise UsageError(
            f"no config.yaml in {run} says which dataset the model was trained on: give dataset="
        )
    dataset = Path(str(read_yaml_settings(settings).get("dataset")))
    if not dataset.is_dir():
        raise UsageError(
            f"the run in {run} was trained on {dataset}, which is not there: give dataset= with "
            "its present folder"
        )
    return dataset
