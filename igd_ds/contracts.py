"""What the rooms of this package promise each other: small frozen dataclasses and Protocols.

A room that needs a batch, an objective, a backbone or a searchable tree imports its contract here
and never the room that implements it.

Letters in shapes: B rows of a micro-batch, T tokens of a padded row, N nodes of a row tree, n
labelled tokens, m nodes that predict them, V vocabulary, K targets of the loss, M trie nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from igd_ds.config.model import ModelOptions, ModelSource
    from igd_ds.engine.step import StepLoss, StepSums
    from igd_ds.items.search_trie import SearchTrie
    from igd_ds.items.store import StoredCatalogue

IGNORED = -100
"""Label of a position that predicts nothing (torch's and transformers' convention)."""

MASKED_ROW = -1
"""Row id that only fills a batch: such a row has no labels."""


@dataclass(frozen=True)
class PaddedRows:
    """The rows of a micro-batch side by side, padded on the right.

    A causal LM reads `input_ids` (prompt and item) and `labels` has the same shape. An
    encoder-decoder reads the prompt in `input_ids`; `labels` (B, T') hold the item alone.

    Example:
        Two rows of a causal LM: prompt 7 8, item 3 1 and prompt 9, item 4 5 1 (1 is EOS, 0 is PAD).

        >>> rows.input_ids.tolist(), rows.labels.tolist()
        ([[7, 8, 3, 1], [9, 4, 5, 1]], [[-100, -100, 3, 1], [-100, 4, 5, 1]])
    """

    input_ids: torch.Tensor
    """int64 (B, T)."""
    attention_mask: torch.Tensor
    """int64 (B, T), 0 on padding."""
    labels: torch.Tensor
    """int64, unshifted: IGNORED where nothing is predicted."""

    def num_tokens(self) -> torch.Tensor:
        """Return the tokens that the model reads, padding excluded: a scalar tensor."""
        return self.attention_mask.sum()

    def to(self, device: torch.device) -> PaddedRows:
        """Return the rows on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class RowTree:
    """The rows of a micro-batch as one tree of N tokens: equal prefixes of rows stand once.

    The nodes stand in depth-first order. Node q sees node k exactly if k <= q < end[k]: its own
    ancestors and itself. Several trees side by side (rows without a common first token) are one
    such array too.

    Example:
        Two rows with the prompts 7 8 and 7 8 3, and the items 3 1 and 4 1 (1 is EOS). The last
        token of a row predicts nothing and has no node.

        >>> tree.token.tolist(), tree.position.tolist(), tree.end.tolist()
        ([7, 8, 3, 4], [0, 1, 2, 3], [4, 4, 4, 4])
        >>> tree.predicting.tolist(), tree.label_place.tolist()  # of the targets 3 1 4 1
        ([1, 2, 3], [0, 1, 1, 2])
    """

    token: torch.Tensor
    """int64 (N,)."""
    position: torch.Tensor
    """int64 (N,), the depth, from 0: the token's place in each of its rows."""
    end: torch.Tensor
    """int64 (N,), one past the last node of the subtree."""
    predicting: torch.Tensor
    """int64 (m,), the different nodes that predict a labelled token, ascending."""
    label_place: torch.Tensor
    """int64 (n,), the place in `predicting` of the node that predicts each labelled token."""

    def num_tokens(self) -> torch.Tensor:
        """Return the tokens that the model reads, N: a scalar tensor."""
        return self.token.new_tensor(len(self.token))

    def to(self, device: torch.device) -> RowTree:
        """Return the tree on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """A micro-batch, everything a training step needs looked up beforehand.

    The n labelled tokens are counted row by row. What the loss needs of each of them lies in flat
    arrays, in the order of the logits that `Backbone.label_logits` returns, whatever form the
    inputs have.

    Example:
        The two rows of PaddedRows' example:

        >>> batch.targets.tolist(), batch.row.tolist()
        ([3, 1, 4, 5, 1], [0, 0, 1, 1, 1])
    """

    inputs: PaddedRows | RowTree
    """What the model reads."""
    targets: torch.Tensor
    """int64 (n,), the labelled tokens."""
    weights: torch.Tensor
    """float32 (n, K), the token's weight in each target of the loss."""
    zero_gain: torch.Tensor
    """bool (n,), whether the token has zero information gain."""
    row: torch.Tensor
    """int64 (n,), the row of the batch it belongs to."""
    node: torch.Tensor
    """int64 (n,), the trie node that the token leads to, which is also the number of its edge."""
    item_ids: torch.Tensor
    """int64 (B,), the row's target, MASKED_ROW where the row only fills the batch."""
    row_ids: torch.Tensor
    """int64 (B,), the row's index in its split, MASKED_ROW where it only fills the batch."""
    null: Batch | None = None
    """The batch's different items behind a prompt without history, if the objective needs it."""
    null_index: torch.Tensor | None = None
    """int64 (n,), which labelled token of `null` each labelled token is."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return _moved(self, device)


Moved = TypeVar("Moved", PaddedRows, RowTree, Batch)


def _moved(value: Moved, device: torch.device) -> Moved:
    """Return a dataclass of tensors and of such dataclasses on `device`."""
    moved: dict[str, Any] = {}
    for name in (entry.name for entry in fields(value)):
        part = getattr(value, name)
        if isinstance(part, torch.Tensor):
            moved[name] = part.to(device, non_blocking=True)
        elif part is not None:
            moved[name] = part.to(device)
    return replace(value, **moved)


@dataclass(frozen=True)
class Logits:
    """Logits of a batch's labelled tokens, (n, V) in the model's dtype.

    Example:
        >>> logits = Logits(backbone.label_logits(model, batch))
    """

    tokens: torch.Tensor
    """Behind the row's own prompt."""
    null: torch.Tensor | None = None
    """Of the same tokens behind the prompt without history, if the objective needs it."""


@dataclass(frozen=True)
class LossTerms:
    """What a micro-batch adds to the loss of an optimizer step, L = Σ_k coefficient_k · N_k / Ω_k.

    N_k is the sum of `numerators[k]`, and Ω_k of `normalisers[k]`, over all micro-batches and ranks
    of the step (IGD Eq. 6). An empty micro-batch gives zeros that still have a graph, so that every
    rank can run its backward pass.

    Example:
        One target, two tokens with losses 3 and 1 nats and weights 1 and 0.5:

        >>> LossTerms(torch.tensor([3.5]), torch.tensor([1.5]), nll=torch.tensor([3.0, 1.0]))
    """

    numerators: torch.Tensor
    """float32 (K,), in nats, with a graph to the logits."""
    normalisers: torch.Tensor
    """float32 (K,), this micro-batch's part of each Ω; equal to `Objective.normalisers(batch)`."""
    nll: torch.Tensor
    """float32 (n,), unweighted NLL of each labelled token in nats, detached: for the log."""
    statistics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further named sums, each of shape () or (K,), detached. Every rank returns the same names."""


@dataclass(frozen=True)
class StepTotals:
    """One optimizer step's sums over all ranks and micro-batches.

    Example:
        >>> losses, omega = torch.tensor([2.3]), torch.tensor([96.0])
        >>> StepTotals(0, losses, normalisers=omega, statistics={})
    """

    step: int
    """The optimizer step, counted from 0."""
    losses: torch.Tensor
    """float64 (K,): N_k / Ω_k."""
    normalisers: torch.Tensor
    """float64 (K,): Ω_k, by which the losses were divided; 1 for a target without weight."""
    statistics: Mapping[str, torch.Tensor]
    """The sums of LossTerms.statistics, float64."""


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may look at beside a batch; made once per run.

    The run's own settings reach an objective by its constructor: its `Options`, and the number of
    steps.

    Example:
        >>> context = ObjectiveContext(stored, SearchTrie.build(stored.trie), "DATASET")
        >>> context.trie.parent[batch.node]  # the trie nodes before the labelled tokens
    """

    stored: StoredCatalogue
    """Catalogue, trie and information gain as numpy arrays."""
    trie: SearchTrie
    """The trie on the device that trains."""
    dataset: str
    """The canonical dataset's folder."""


@dataclass(frozen=True)
class Likelihood:
    """How logits become token probabilities: what an objective trains and a search ranks by.

    Example:
        >>> Likelihood("masked", temperature=4.5)  # of a model trained by `msl` with τ = 4.5
    """

    softmax: str = "full"
    """"full": over the vocabulary. "masked": over the trie's next tokens only."""
    temperature: float = 1.0
    """The logits are divided by it."""

    def with_asked(self, softmax: str, temperature: float | None) -> Likelihood:
        """Return this likelihood with what a user asks for; "auto" and None leave it as it is."""
        return Likelihood(
            self.softmax if softmax == "auto" else softmax,
            self.temperature if temperature is None else temperature,
        )


class Objective(Protocol):
    """What a training minimises. A row of the table in `igd_ds/objectives/__init__.py`.

    An objective is made from its own options, the dataclass `Options`, whose fields are its flags.
    It turns the logits of labelled tokens into K numerators and normalisers, and may have a state
    that it updates after each step (the state is saved with every checkpoint).

    Each step calls `normalisers` for every micro-batch, then `coefficients` once, then `loss` for
    every micro-batch, then `update` once.

    Args:
        options: an instance of `Options`.
        total_steps: optimizer steps the run has at most.

    Example:
        Most objectives derive from `igd_ds.objectives.weighted.TokenWeighting`. Plain
        cross-entropy, one target with weight 1 for every token:

        >>> class Uniform(TokenWeighting):
        ...     def weights(self, context):
        ...         return np.ones((len(context.stored.catalogue.token_ids), 1), np.float32)
    """

    Options: ClassVar[type[Any]]
    """Frozen dataclass of flags (see `config.options.option`) with a method `check`."""
    tags: ClassVar[Mapping[str, str]]
    """Scalars that `update` returns: tag → meaning and unit."""
    needs_global: ClassVar[bool]
    """Whether it learns from losses over the whole step, so that Ω has to be global."""
    targets: tuple[str, ...]
    """Names of the K targets."""
    needs_null: bool
    """Whether `loss` needs the logits behind a prompt without history."""

    def __init__(self, options: Any, total_steps: int) -> None: ...

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return a weight per catalogue token and target, float32 (tokens, K), once per run."""

    def normalisers(self, batch: Batch) -> torch.Tensor:
        """Return this batch's part of each Ω, float64 (K,), before any forward pass."""

    def coefficients(self, step: int) -> torch.Tensor:
        """Return the factor of each target in the loss of optimizer step `step`, float32 (K,)."""

    def loss(self, batch: Batch, logits: Logits, context: ObjectiveContext) -> LossTerms:
        """Return what a micro-batch adds to the loss of the present step."""

    def nll(self, batch: Batch, logits: torch.Tensor, context: ObjectiveContext) -> torch.Tensor:
        """Return the unweighted NLL of the labelled tokens in nats, float32 (n,)."""

    def likelihood(self) -> Likelihood:
        """Return how a model trained by this objective is to be validated and searched."""

    def update(self, totals: StepTotals) -> Mapping[str, float]:
        """Learn from a finished step; return scalars to log, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values; {} where there is none."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""


class PromptTree(Protocol):
    """B prompts and the trees of tokens that grow behind them, read by a model.

    Logits lie on the model's device. All other tensors lie on the CPU: whoever grows the tree
    decides there, and reads the device once per pass.

    Tokens come in *chains* that go through the model together. A chain hangs under the last token
    of an earlier chain; chains 0 … B − 1 are the prompts. A token sees its user's prompt, its own
    ancestors and itself, so its log-probability equals that of a full forward pass over its path.

    V is the size of the vocabulary, or the number of `output_tokens`.

    Example:
        >>> logits = tree.prefill([np.array([5, 6, 7]), np.array([5, 9])])  # (2, V)
        >>> one = torch.tensor([1])
        >>> user, token = torch.tensor([0]), torch.tensor([42])
        >>> behind, number = tree.extend(user, one, token)
        >>> behind.shape, number.tolist()
        (torch.Size([1, V]), [2])
    """

    output_tokens: np.ndarray | None
    """int64 (V,), ascending: the tokens whose logits are computed, if not those of all tokens."""
    prompt_logits: torch.Tensor
    """Logits of the first token behind each prompt, (B, V); set by `prefill`."""

    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Start new trees: read each prompt (integer token ids) once; return `prompt_logits`."""

    def extend(
        self,
        parent: torch.Tensor,
        length: torch.Tensor,
        tokens: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append Q chains and send their T tokens through the model in one pass.

        Args:
            parent: (Q,) int64, the earlier chain under whose last token each new chain begins.
            length: (Q,) int64, tokens per chain, at least 1.
            tokens: (T,) int64, the chains' tokens one after the other.
            keep: (n,) int64, the places in `tokens` behind which logits are wanted; None: all T.

        Returns:
            Logits behind each of these tokens, (n, V), and the new chains' numbers, (Q,).
        """

    def retain(self, users: torch.Tensor) -> None:
        """Free what is kept of all users but these (ascending); the others get no more tokens."""


@dataclass(frozen=True)
class Capabilities:
    """What a backbone can do, found out before any weight is loaded."""

    packed_training: bool
    """Whether rows can be trained as one tree (`RowTree`). False: they are padded."""
    tree_search: bool
    """Whether the search reads a prompt once for all its hypotheses. False: each hypothesis has a
    row of the model's own KV cache, which is slower and gives the same lists."""
    attention: tuple[str, ...]
    """Attention kernels it can be trained with (`--attn_implementation`)."""
    adapters: bool
    """Whether LoRA adapters can be trained on it."""


class Backbone(Protocol):
    """A kind of language model: how it is checked, built, loaded, asked for logits and searched.

    Example:
        >>> backbone = backbone_of(model_config)
        >>> backbone.capabilities(model_config).tree_search
        True
        >>> model = backbone.build(options, model_config, torch.float32, torch.device("cpu"))
        >>> backbone.label_logits(model, batch).shape  # (n, V)
    """

    def capabilities(self, model_config: Any) -> Capabilities:
        """Return what models of this configuration can do."""

    def fit_model_config(
        self, model_config: Any, options: ModelOptions, tokenizer: Any, added_ids: range
    ) -> None:
        """Check that configuration, options and tokenizer suit each other; complete a new model's.

        Raises:
            UsageError: what does not suit, and what to do.
        """

    def num_trained_parameters(
        self, model_config: Any, options: ModelOptions, added_ids: range = range(0)
    ) -> int:
        """Return how many parameters the options train, without making any weights."""

    def build(
        self,
        options: ModelOptions,
        model_config: Any,
        dtype: torch.dtype,
        device: torch.device,
        added_ids: range = range(0),
        seed: int = 0,
    ) -> torch.nn.Module:
        """Build the model that the options describe, with random or pretrained weights."""

    def load(
        self, source: ModelSource, load_in_4bit: bool, device: torch.device
    ) -> torch.nn.Module:
        """Load what a training saved, for inference."""

    def label_logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the logits (n, V) that predict the batch's labelled tokens, in their order."""

    def prompt_tree(
        self, model: torch.nn.Module, output_tokens: np.ndarray | None = None
    ) -> PromptTree:
        """Return an empty tree for one batch of searches.

        Args:
            model: in eval mode.
            output_tokens: int64, ascending, see PromptTree.
        """


class Training(Protocol):
    """What an entry gives the loop (`igd_ds/loop.py`): batches, the loss of a step, a validation.

    Example:
        `igd train` has GenerativeTraining, `igd baseline` SequentialTraining, `igd prefer`
        PreferenceTraining and PolicyTraining:

        >>> training = GenerativeTraining(config, run, inputs, micro_batch=8)
        >>> fit(engine, training, config, run, LoopState(), StopRequest())
    """

    @property
    def loss(self) -> StepLoss[Any]:
        """What a step minimises."""

    @property
    def normalization(self) -> str:
        """How Ω is taken, see `optimizer_step`."""

    @property
    def validation_metric(self) -> str:
        """What early stopping watches; `validate` returns it as `valid/METRIC`."""

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of the metric is better."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps the run has at most."""

    @property
    def tags(self) -> Mapping[str, str]:
        """Tags of its own, beside runlog.TAGS: tag → meaning and unit."""

    def facts(self) -> dict[str, str]:
        """Return what the header of a run says of the data: name → fact."""

    def micro_batches(self, first: int) -> Iterator[list[Any]]:
        """Yield this rank's micro-batches of optimizer steps `first`, `first` + 1, …"""

    def values(self, sums: StepSums, seconds: float) -> dict[str, float]:
        """Return the log's scalars of some steps, which took `seconds`."""

    def validate(self, engine: Any) -> dict[str, float]:
        """Return the validation's scalars; all ranks call it."""

    def save(self, engine: Any) -> None:
        """Save the present weights as RUN/model; all ranks call it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the objective's state, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of `state_dict`."""
