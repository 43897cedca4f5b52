"""The tree of tokens over any causal LM: slower than `prompt_tree`, and right for every model.

Each run is a row of a batch of its own. Rows of one pass have equal lengths, so no row is padded:
recurrent models, for example, carry padding into their state.

Letters in shapes: B users, P prompt tokens, Q runs, T tokens of all runs, N rows of one pass, L
tokens of a row behind its prompt, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from igd_ds import distributed
from igd_ds.backbones.capabilities import forward_arguments
from igd_ds.backbones.output_rows import OutputRows
from igd_ds.backbones.prompt_tree import check_prompts

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

TOKENS_PER_PASS = 16384
"""Most tokens, prompts included, that go through the model at once: it bounds the memory."""


@dataclass
class Rows:
    """Runs that go through the model in one pass."""

    runs: list[int]
    """N numbers of the runs, counted from the first one of this `extend`."""
    users: list[int]
    """N users."""
    tails: list[list[int]]
    """N paths of L tokens each, from the prompt to the end of the run."""
    keep: int
    """Tokens at the end of each row whose logits are wanted."""


@dataclass
class StoredPrompts:
    """The KV cache of all prompts of one length."""

    row_of_user: dict[int, int]
    cache: DynamicCache


class CachePromptTree:
    """The trees of tokens behind B prompts, by full rows. It implements `contracts.PromptTree`.

    Where the model keeps one key and value per token in transformers' DynamicCache, each prompt is
    read once and a pass reads the path behind it. Otherwise (recurrent states, windows, code of the
    model's own) a pass reads prompt and path.

    Args:
        model: Any causal LM in eval mode. It may be wrapped by PEFT or quantised.
        output_tokens: int64 (V,), ascending: the tokens whose logits are computed; None: all.
    """

    def __init__(self, model: PreTrainedModel, output_tokens: np.ndarray | None = None) -> None:
        assert not model.training, "call model.eval() before searching"
        self.model: Any = model
        self.output_tokens = output_tokens
        self.output_rows = OutputRows(model, output_tokens)
        self.device: torch.device = model.device
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.accepted = forward_arguments(base)
        self.may_reuse = type(base).__module__.startswith("transformers.models.") and not getattr(
            base, "_is_stateful", False
        )
        # Under ZeRO-3 every forward pass is a collective, so ranks must make equally many.
        is_partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        self.any_rank: Callable[[bool], bool] = distributed.any_rank if is_partitioned else bool

        self.prompt_logits: torch.Tensor
        self.prompts: dict[int, list[int]] = {}
        self.stored: dict[int, StoredPrompts] = {}  # by length of the prompt
        self.run_user: list[int] = []
        self.run_path: list[list[int]] = []  # tokens from the prompt to the end of each run

    @torch.no_grad()
    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Start new trees: read each prompt (integer token ids, (P,)) once.

        Returns:
            Logits of the first token behind each prompt, (B, V) in the model's dtype.

        Raises:
            UsageError: a prompt has no tokens.
        """
        lengths = check_prompts(prompts)
        self.prompts = {
            user: np.asarray(prompt).astype(int).tolist() for user, prompt in enumerate(prompts)
        }
        self.stored = {}
        self.run_user = list(self.prompts)
        self.run_path = [[] for _ in prompts]

        users_of: dict[int, list[int]] = defaultdict(list)
        for user, length in enumerate(lengths):
            users_of[length].append(user)
        logits: list[torch.Tensor | None] = [None] * len(prompts)
        pending = list(users_of.items())
        while self.any_rank(bool(pending)):
            if not pending:
                self._idle_pass()
                continue
            length, users = pending.pop()
            last, cache = self._forward([self.prompts[user] for user in users], keep=1)
            for user, row in zip(users, last[:, -1], strict=True):
                logits[user] = row
            if self._is_reusable(cache, length):
                rows = {user: row for row, user in enumerate(users)}
                self.stored[length] = StoredPrompts(rows, cache)
        self.prompt_logits = torch.stack([row for row in logits if row is not None])
        return self.prompt_logits

    @torch.no_grad()
    def extend(
        self,
        parent: torch.Tensor,
        length: torch.Tensor,
        tokens: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append Q runs and send them through the model, rows of equal length together.

        Args:
            parent: (Q,) int64, the earlier run under whose last token each new run begins.
            length: (Q,) int64, tokens per run, at least 1.
            tokens: (T,) int64, the runs' tokens one after the other.
            keep: (n,) int64, the places in `tokens` behind which logits are wanted; None: all T.

        Returns:
            Logits behind each of these tokens, (n, V), and the new runs' numbers, (Q,).
        """
        first = len(self.run_user)
        lengths: list[int] = length.tolist()
        for above, run in zip(parent.tolist(), tokens.split(lengths), strict=True):
            self.run_user.append(self.run_user[above])
            self.run_path.append(self.run_path[above] + run.tolist())

        pending = self._batches(first, lengths)
        found: list[torch.Tensor | None] = [None] * len(lengths)
        while self.any_rank(bool(pending)):
            if not pending:
                self._idle_pass()
                continue
            rows = pending.pop()
            for run, logits in zip(rows.runs, self._read(rows), strict=True):
                found[run] = logits[-lengths[run] :]

        numbers = torch.arange(first, len(self.run_user))
        logits_of_runs = [logits for logits in found if logits is not None]
        logits = torch.cat([self.prompt_logits[:0], *logits_of_runs])
        return logits if keep is None else logits[keep.to(self.device)], numbers

    def _batches(self, first: int, lengths: list[int]) -> list[Rows]:
        """Group the runs from number `first` on by lengths of prompt and path; bound each group."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for run in range(len(lengths)):
            prompt = self.prompts[self.run_user[first + run]]
            groups[len(prompt), len(self.run_path[first + run])].append(run)

        batches = []
        for (prompt_length, path_length), runs in groups.items():
            size = max(1, TOKENS_PER_PASS // (prompt_length + path_length))
            for begin in range(0, len(runs), size):
                some = runs[begin : begin + size]
                users = [self.run_user[first + run] for run in some]
                tails = [self.run_path[first + run] for run in some]
                batches.append(Rows(some, users, tails, max(lengths[run] for run in some)))
        return batches

    def _read(self, rows: Rows) -> torch.Tensor:
        """Return the logits behind the last `keep` tokens of each row, (N, keep, V)."""
        stored = self.stored.get(len(self.prompts[rows.users[0]]))
        if stored is None:
            whole = [
                self.prompts[user] + tail for user, tail in zip(rows.users, rows.tails, strict=True)
            ]
            return self._forward(whole, rows.keep)[0]

        index = torch.tensor([stored.row_of_user[user] for user in rows.users], device=self.device)
        past = DynamicCache()
        for number, layer in enumerate(stored.cache.layers):
            past.update(layer.keys[index], layer.values[index], number)
        return self._forward(rows.tails, rows.keep, past)[0]

    def _forward(
        self, rows: list[list[int]], keep: int, past: DynamicCache | None = None
    ) -> tuple[torch.Tensor, Cache | None]:
        """Send rows of equal length through the model, behind the cached tokens `past`, if any.

        Returns:
            Logits behind the last `keep` tokens, (N, keep, V), and the model's cache.
        """
        ids = torch.tensor(rows, device=self.device)
        begin = past.get_seq_length() if past is not None else 0
        arguments: dict[str, Any] = {
            "attention_mask": ids.new_ones((len(ids), begin + ids.shape[1])),
            "past_key_values": past,
            "use_cache": self.may_reuse,
            "logits_to_keep": keep,
        }
        with self.output_rows.alone():
            output = self.model(
                input_ids=ids, **{key: arguments[key] for key in arguments.keys() & self.accepted}
            )
        logits = self.output_rows.of(output.logits[:, -keep:])
        return logits, getattr(output, "past_key_values", None)

    def _is_reusable(self, cache: Cache | None, length: int) -> bool:
        """Whether the cache holds one key and value per token and layer, and nothing else."""
        if not self.may_reuse or cache is None or type(cache) is not DynamicCache:
            return False
        return all(
            type(layer) is DynamicLayer and layer.is_initialized and layer.keys.shape[-2] == length
            for layer in cache.layers
        )

    def _idle_pass(self) -> None:
        """Take part in a pass of other ranks."""
        self._forward([[0]], keep=1)

    def retain(self, users: torch.Tensor) -> None:
        """Free what is kept of all users but these (ascending). The others get no more tokens."""
        kept: list[int] = users.tolist()
        self.prompts = {user: self.prompts[user] for user in kept}
        for length, stored in list(self.stored.items()):
            rows = {user: row for user, row in stored.row_of_user.items() if user in self.prompts}
            if not rows:
                del self.stored[length]
                continue
            index = torch.tensor(list(rows.values()), device=self.device)
            for layer in stored.cache.layers:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
            stored.row_of_user = {user: row for row, user in enumerate(rows)}
