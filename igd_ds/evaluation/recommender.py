"""Recommend for histories with a trained run: the API, and the search under the evaluator.

    recommender = Recommender.load("runs/demo/igd")
    for recommendation in recommender.recommend([[3, 17, 5]], k=10, alpha=0.2)[0]:
        print(recommendation.rank, recommendation.title, recommendation.score)

A history is a user's item ids of the dataset the run was trained on, oldest first.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from igd_ds import backbones as models
from igd_ds import distributed
from igd_ds.backbones import causal_lm
from igd_ds.backbones.prompt_tree import prompt_tree
from igd_ds.baselines.leaves import ranges
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import load_catalogue
from igd_ds.search.engine import Limits, SearchResult, search
from igd_ds.search.filters import Guidance, ItemFilter, ItemRanges
from igd_ds.search.frontier import PerUser
from igd_ds.search.scoring import Scoring, ScoringOptions

SCORINGS_KEPT = 8  # options whose arrays stay on the device: a service has few, a sweep over α shall not fill the memory


@dataclass(frozen=True)
class Recommendation:
    """One place of a ranked list."""

    rank: int
    """1 is the best."""
    item_ids: tuple[int, ...]
    """The item, or all items with this token path that the user may get: the model cannot tell them apart."""
    title: str | None
    """Title of the first of them; None where the dataset has semantic IDs alone."""
    score: float
    """S / n^p in nats, n tokens with EOS."""
    certified: bool
    """Whether this place is proven: no item outside the list scores higher. False after a beam search."""


class RankedList(list):
    """A user's Recommendations, best first. `short`: fewer than asked for, because filter, guidance or catalogue has no more."""

    def __init__(self, recommendations: Sequence[Recommendation], short: bool):
        super().__init__(recommendations)
        self.short = short


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which model to recommend with, and how it is loaded; the evaluator's settings of the same names."""

    model: str
    """RUN/model."""
    dataset: str
    """Canonical dataset folder."""
    dtype: str = "auto"
    """Precision of the model, such as bfloat16; auto: as saved."""
    max_length: int = 0
    """Tokens of prompt + longest item; 0: as trained."""
    base_model: str = ""
    """Base weights of an adapter, where they moved since training."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class Recommender:
    """A trained model with its dataset, catalogue, prompt and search trie. Made by `load`, or in two steps, weights last.

    Threads may share one: their searches take turns.

    Args:
        source: Source, or anything with its attributes, such as EvalConfig.
        device: where to search; None: this process's GPU, or the CPU where there is none.

    Attributes:
        dataset, tokenizer, stored, prompts: InteractionDataset, tokenizer, StoredCatalogue and PromptBuilder of the run.
        ranges: the catalogue's ItemRanges, which item filters and guidance are built with.
        batch_size: histories searched at once by `recommend`; may be set.
        limits: positions per model pass and per user, for `recommend`; may be set.

    Raises:
        ValueError: the folder is no model of train.py's, tokenizer, catalogue and dataset do not belong together, or the prompt's
            frame does not fit `max_length`.
    """

    def __init__(self, source, device: torch.device | str | None = None):
        self.source, self.description = source, causal_lm.describe(Path(source.model))
        self.device = torch.device(device) if device is not None else distributed.device()
        trained = self.description["max_length"]
        if source.max_length > trained:
            raise UsageError(
                f"--max_length {source.max_length} exceeds the {trained} the model was trained with"
            )
        self.dataset = InteractionDataset.load(source.dataset)
        self.tokenizer = causal_lm.load_tokenizer(source.model, source.trust_remote_code)
        self.stored = _load_catalogue(
            Path(source.model) / "catalogue", self.tokenizer, self.dataset
        )
        template = Template.from_dict(
            self.description["prompt"], f"{source.model}/{causal_lm.DESCRIPTION_FILE}"
        )
        catalogue = self.stored.catalogue
        budget = (source.max_length or trained) - catalogue.max_length
        self.prompts = PromptBuilder.build(
            template, self.tokenizer, self.dataset, catalogue.kind, budget
        )
        self.num_leaves = int(np.count_nonzero(self.stored.trie.is_leaf))
        self.trie = SearchTrie.build(self.stored.trie, self.device)
        self.ranges = ItemRanges.build(self.stored.trie, self.device)
        self.batch_size, self.limits = 16, Limits()
        self._one_at_a_time = threading.Lock()
        self.model = None
        build = functools.partial(
            Scoring.build, self.stored.trie, self.stored.gain, device=self.device
        )
        self._scoring = functools.lru_cache(SCORINGS_KEPT)(build)

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
        """Load what train.py left in a run folder, weights included.

        Args:
            run: the run folder, or the model/ folder in it.
            dataset: the dataset folder that the run was trained on; None: where the run's config.yaml says it lies.
            device, dtype, base_model, trust_remote_code: see Recommender and Source.

        Raises:
            ValueError: as Recommender; no dataset folder known; unknown dtype.
        """
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UsageError(f"dtype is auto, float32, bfloat16 or float16, found '{dtype}'")
        model = Path(run)
        if (model / "model").is_dir():
            run, model = model, model / "model"
        else:
            run = model.resolve().parent
        if dataset is None:
            dataset = _dataset_of(run)
        source = Source(
            model=str(model),
            dataset=str(dataset),
            dtype=dtype,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
        )
        recommender = cls(source, device)
        recommender.load_weights()
        return recommender

    def load_weights(self) -> None:
        """Load the model, once; nothing can be searched before."""
        if self.model is None:
            name = causal_lm.base_of(self.source) or self.source.model
            adapter = models.adapter_of(
                models.read_model_config(name, self.source.trust_remote_code)
            )
            self.model = adapter.load_trained(
                self.source, self.description["load_in_4bit"], self.device
            )

    def scoring(self, options) -> Scoring:
        """Return the Scoring of ScoringOptions (or anything with their attributes, such as EvalConfig); the last few are kept."""
        values = {
            field.name: getattr(options, field.name) for field in dataclasses.fields(ScoringOptions)
        }
        return self._scoring(ScoringOptions(**values | {"alpha": tuple(options.alpha)}))

    def per_user(
        self,
        labels: Sequence[str],
        allow: Sequence | None = None,
        deny: Sequence | None = None,
        guidance: tuple[np.ndarray, float] | None = None,
    ) -> PerUser:
        """Return the item filter and the guidance of a batch's users, `labels` being their names in error messages.

        The other arguments are those of `recommend`, for these users. With both, the guide's probabilities are those of the
        allowed items: mass of denied ones would lead beams to where nothing can be recommended.

        Raises:
            ValueError: as ItemFilter and Guidance, or a user for whom the two together leave nothing.
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
        items = torch.arange(q.shape[1], device=self.device)
        for user, row in enumerate(q):
            row[~item_filter.allows_items(torch.full_like(items, user), items).cpu().numpy()] = 0
            if not row.any():
                raise UsageError(
                    f"{labels[user]}: item filter and guidance together leave nothing; loosen one of them"
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
    ) -> SearchResult:
        """Rank the catalogue for one batch of histories (item ids, oldest first), at every α of `scoring`; see `search.search`.

        Histories too long for the prompt lose their oldest items.
        """
        assert self.model is not None, "call load_weights() first"
        with self._one_at_a_time:  # a search changes how the model attends while it lasts
            tree = prompt_tree(self.model)
            tree.prefill([self.prompts.encode(history) for history in histories])
            return search(tree, self.trie, scoring, num_beams, method, per_user, limits)

    def items_under(
        self, leaves: np.ndarray, users: np.ndarray, item_filter: ItemFilter | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of leaves (n,) that the users (n,) of a batch may get: ids leaf after leaf, and their number (n,)."""
        trie = self.stored.trie
        count = trie.num_items[leaves].astype(np.int64)
        owner = np.repeat(np.arange(len(leaves)), count)
        items = trie.item_order[ranges(trie.first_item[leaves].astype(np.int64), count)]
        if item_filter is not None:
            user, item = (
                torch.from_numpy(np.asarray(x, np.int64)).to(self.device)
                for x in (users[owner], items)
            )
            allowed = item_filter.allows_items(user, item).cpu().numpy()
            owner, items = owner[allowed], items[allowed]
        return items, np.bincount(owner, minlength=len(leaves))

    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: int = 10,
        alpha: float = 0.2,
        search: str = "beam",
        allow: Sequence[Sequence[int] | None] | None = None,
        deny: Sequence[Sequence[int] | None] | None = None,
        guidance: tuple[np.ndarray, float] | None = None,
        **scoring,
    ) -> list[RankedList]:
        """Return one ranked list per history; no list depends on the other histories, however many there are.

        Args:
            histories: per user the item ids met so far, oldest first, at least one.
            k: how many items to list; a user who can get fewer gets a list with `short` set.
            alpha: α in [0, 1], strength of decisiveness calibration (Eq. 9); 0 is plain beam search.
            search: "beam", or "exact" for the provably best items.
            allow: per user the only item ids to choose from, or None for all items.
            deny: per user the item ids to leave out (seen, out of stock), or None for none.
            guidance: a second scorer's item probabilities, array of floats (users, N), and the weight of its say; see Guidance.
            **scoring: other fields of ScoringOptions, such as length_penalty.

        Raises:
            ValueError: names the user (position in `histories`) with an empty history, an item that is not in the catalogue or
                nothing left to recommend; or k < 1, an option out of its range, `limits` below one position per item of the list.
        """
        if not isinstance(k, int) or k < 1:
            raise UsageError(f"k must be a whole number and at least 1, found {k}")
        if guidance is not None:
            guidance = np.asarray(guidance[0], dtype=np.float64), guidance[1]
        checked = [self._checked(history, user) for user, history in enumerate(histories)]
        labels = [f"histories[{user}]" for user in range(len(checked))]
        for name, entries in (
            ("allow", allow),
            ("deny", deny),
            ("guidance", guidance and guidance[0]),
        ):
            if entries is not None and len(entries) != len(checked):
                raise UsageError(
                    f"{name} takes one entry per history: found {len(entries)} for {len(checked)}"
                )
        options = self.scoring(ScoringOptions(alpha=(alpha,), **scoring))
        lists = []
        for begin in range(0, len(checked), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            allowed, denied = (
                None if entries is None else entries[batch] for entries in (allow, deny)
            )
            guide = None if guidance is None else (guidance[0][batch], guidance[1])
            per_user = self.per_user(labels[batch], allowed, denied, guide)
            width = min(k, self.num_leaves)
            found = self.search(checked[batch], options, width, search, per_user, self.limits)
            lists += self._ranked_lists(found, k, per_user.item_filter)
        return lists

    def _checked(self, history: Sequence[int], user: int) -> np.ndarray:
        items, num_items = np.asarray(history), self.dataset.num_items
        if items.ndim != 1 or (items.size and items.dtype.kind not in "iu"):
            raise UsageError(
                f"histories[{user}]: a history is a flat list of item ids, whole numbers; found {history!r:.80}"
            )
        if not items.size:
            raise UsageError(
                f"histories[{user}]: the history is empty; leave the user out, or give at least one item"
            )
        unknown = items[(items < 0) | (items >= num_items)]
        if unknown.size:
            raise UsageError(
                f"histories[{user}]: item {unknown[0]} is not in the catalogue; ids are 0 to {num_items - 1}"
            )
        return items.astype(np.int64)

    def _ranked_lists(
        self, found: SearchResult, k: int, item_filter: ItemFilter | None
    ) -> list[RankedList]:
        leaves, scores, certified = (
            t[0].cpu().numpy() for t in (found.leaves, found.scores, found.certified)
        )
        user, place = np.nonzero(leaves >= 0)
        items, count = self.items_under(leaves[user, place], user, item_filter)
        lists = [[] for _ in leaves]
        for u, p, ids in zip(user, place, np.split(items, count.cumsum()[:-1]), strict=True):
            title = self.dataset.titles[ids[0]]
            lists[u].append(
                Recommendation(
                    int(p) + 1,
                    tuple(ids.tolist()),
                    title,
                    float(scores[u, p]),
                    bool(p < certified[u]),
                )
            )
        return [RankedList(entries, short=len(entries) < k) for entries in lists]


def _load_catalogue(folder: Path, tokenizer, dataset):
    """Map the model's catalogue after checking that it is this tokenizer's and this dataset's."""
    eos = load_catalogue(folder).catalogue.eos_token_id
    if (
        tokenizer.eos_token_id != eos
    ):  # the tokenizer's fingerprint would differ as well, without saying why
        raise UsageError(
            f"items of the catalogue in {folder} end in token {eos}, but the tokenizer's EOS is {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token!r}): undo the change of eos_token, or build the catalogue anew"
        )
    return load_catalogue(folder, tokenizer=tokenizer, dataset=dataset)


def _dataset_of(run: Path) -> Path:
    """Return the dataset folder that a run's config.yaml names."""
    settings = run / "config.yaml"
    if not settings.is_file():
        raise UsageError(
            f"no config.yaml in {run} says which dataset the model was trained on: give dataset="
        )
    dataset = Path(yaml.safe_load(settings.read_text())["dataset"])
    if not dataset.is_dir():
        raise UsageError(
            f"the run in {run} was trained on {dataset}, which is not there: give dataset=, where it lies now"
        )
    return dataset
