"""What the loop trains for `igd prefer --objective grpo`: groups of items from the live search.

Letters in shapes: B rows of a micro-batch, G items of a group, n labelled tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.contracts import MASKED_ROW, Batch, LossTerms, StepTotals
from igd_ds.engine.ds_config import DsConfig
from igd_ds.engine.step import StepSums
from igd_ds.errors import UsageError
from igd_ds.folders import differing, read_json_object, write_json
from igd_ds.generative_training import ratio
from igd_ds.items.decisiveness import normalised_gain
from igd_ds.objectives.policy import advantages, has_spread, k3, policy_loss
from igd_ds.objectives.preference import per_item
from igd_ds.prefer_config import PreferConfig
from igd_ds.preference.continued import ContinuedTraining
from igd_ds.preference.scorer import ItemScorer
from igd_ds.preference.start import Start

TARGETS = ("policy", "kl")

START_FILE = "start.json"
"""In RUN: the sha256 of the weights that the training began with, and of the reference's."""


@dataclass(frozen=True)
class Groups:
    """A micro-batch: the items of each row that the search has found, and their advantages."""

    branches: Batch
    """B · G rows, one per item."""
    advantage: torch.Tensor
    """float32 (B, G); 0 where a row only fills the batch."""
    reward: torch.Tensor
    """float32 (B, G); 0 likewise."""
    is_row: torch.Tensor
    """bool (B,): whether a row is real."""
    holds_target: torch.Tensor
    """bool (B,): whether the group of a real row holds the target."""
    is_flat: torch.Tensor
    """bool (B,): whether the rewards of a real row's group are all equal."""

    def to(self, device: torch.device) -> Groups:
        """Return the groups on `device`."""
        return Groups(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class PolicyLoss:
    """Mean over items of the mean over their tokens (engine.step.StepLoss).

    A token's loss is −exp(l − stop(l))·A·credit + β·k3, l = log p.
    """

    scorer: ItemScorer
    beta: float
    credit: torch.Tensor
    """float32 (M,) on the device: what share of A the token into each trie node gets."""
    reference: Any
    """A model, or None for the model in training with its adapter switched off."""

    def normalisers(self, batch: Groups) -> torch.Tensor:
        """Return the number of items, for both targets, float64 (2,)."""
        num_items = batch.is_row.sum().double() * batch.advantage.shape[1]
        return num_items.repeat(len(TARGETS))

    def coefficients(self, step: int) -> torch.Tensor:
        """Return 1 and β."""
        return torch.tensor([1.0, self.beta])

    def terms(self, engine: Any, batch: Groups) -> LossTerms:
        """Run the forward passes and return both sums over items, with sums for the log."""
        batch = batch.to(distributed.device())
        branches = batch.branches
        reference = -self.scorer.reference_nll(engine, self.reference, branches)
        logprob = -self.scorer.nll(engine, branches)
        advantage = batch.advantage.flatten()[branches.row] * self.credit[branches.node]

        num_tokens = per_item(torch.ones_like(reference), branches).clamp_min(1)
        by_token = (policy_loss(logprob, advantage), k3(logprob, reference))
        numerators = torch.stack([
            (per_item(values, branches) / num_tokens).sum() for values in by_token
        ])  # fmt: skip
        statistics = {
            "reward": batch.reward.sum(),
            "rows": batch.is_row.float().sum(),
            "holds_target": batch.holds_target.float().sum(),
            "flat": batch.is_flat.float().sum(),
            "tokens": reference.new_tensor(len(reference)),
            "input_tokens": branches.inputs.num_tokens(),
        }
        normalisers = self.normalisers(batch).float()
        return LossTerms(numerators, normalisers, -logprob.detach(), statistics)

    def update(self, totals: StepTotals) -> Mapping[str, float]:
        """Do nothing: the loss has no state."""
        return {}


class PolicyTraining(ContinuedTraining):
    """One policy training of a trained model (contracts.Training).

    Call `begin` once, when the engine is there and a checkpoint is loaded.
    """

    tags: Mapping[str, str] = {
        "train/loss_policy": "mean over items of −A·credit; about 0 by design, its gradient is not",
        "train/kl": "nats per token: k3 estimate of KL(π ‖ π_ref), mean over tokens, then items",
        "train/reward": "mean reward of the items",
        "train/groups_with_target": "share of groups that hold the target, 0 to 1",
        "train/groups_without_spread": "share of groups whose rewards are all equal, 0 to 1",
        "speed/rollout_seconds": "seconds per step in which rank 0 searches and rewards groups",
        "speed/update_seconds": "seconds per step besides: forward, backward, optimizer",
    }

    def __init__(self, config: PreferConfig, run: Path, start: Start, ds: DsConfig):
        super().__init__(config, run, start, ds)
        assert start.reward is not None, "load_start finds the reward of a policy training"
        self.reward = start.reward
        self.rollout_seconds = 0.0
        self.engine: Any = None
        self.loss: PolicyLoss

    def claim(self, is_begun: bool) -> None:
        """Check that model and reference are those that the run began with. Rank 0.

        Args:
            is_begun: whether the run has a checkpoint.

        Raises:
            UsageError: they have other weights now.
        """
        record, identity = self.run / START_FILE, self.start.identity()
        before = read_json_object(record, "start a new run") if record.is_file() else identity
        if is_begun and (changed := differing(before, identity)):
            raise UsageError(
                f"{self.run} began with other weights; these differ: {', '.join(changed)}. Restore "
                "them, or start a new run"
            )
        write_json(record, identity)

    def begin(self, engine: Any, step: int) -> None:
        """Take note of the engine and load the reference; all ranks call it."""
        self.engine = engine
        trie, gain = self.start.stored.trie, self.start.stored.gain
        credit = np.ones(trie.num_nodes)
        if self.config.token_credit == "gain":
            credit = normalised_gain(trie, gain)
        self.loss = PolicyLoss(
            self.scorer,
            self.config.strength(),
            torch.from_numpy(credit.astype(np.float32)).to(distributed.device()),
            self.load_reference(),
        )

    def micro_batches(self, first: int) -> Iterator[list[Groups]]:
        """Yield this rank's groups of steps `first`, `first` + 1, …, found by the present model."""
        for step in range(first, self.total_steps):
            if step == first or step % self.steps_per_epoch == 0:
                order = self.rows_of(step // self.steps_per_epoch)
            began = time.perf_counter()
            parts = self.own_parts(order[step % self.steps_per_epoch])
            leaves = self.live_search.leaves(
                self.engine, np.concatenate(parts), self.config.group_size
            )
            of_parts = np.split(leaves, len(parts))
            groups = [self._groups(*each) for each in zip(parts, of_parts, strict=True)]
            self.rollout_seconds += time.perf_counter() - began
            yield groups

    def _groups(self, rows: np.ndarray, leaves: np.ndarray) -> Groups:
        """Reward the leaves (B, G) that the search has found for rows (B,)."""
        trie, split = self.start.stored.trie, self.collator.split
        real, is_row = np.maximum(rows, 0), rows != MASKED_ROW

        # Items of one path are one item to the model: the target stands for its path.
        targets = split.targets[real][:, None]
        is_target = leaves == trie.leaf_of_item[targets]
        items = np.where(is_target, targets, trie.item_order[trie.first_item[leaves]])

        rewards = self.reward(split, real, items)
        of_row = is_row[:, None]
        tensors = {
            "advantage": np.where(of_row, advantages(rewards), 0).astype(np.float32),
            "reward": np.where(of_row, rewards, 0).astype(np.float32),
            "is_row": is_row,
            "holds_target": is_row & is_target.any(1),
            "is_flat": is_row & ~has_spread(rewards),
        }
        branches = self.collator.branches(rows, items)
        return Groups(branches, **{n: torch.from_numpy(values) for n, values in tensors.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds of searching since the last entry of the log."""
        return {"rollout_seconds": self.rollout_seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.rollout_seconds = state.get("rollout_seconds", 0.0)

    def values(self, sums: StepSums, seconds: float) -> dict[str, float]:
        """Return the log's scalars: sums first, one division last."""
        found = {name: float(value) for name, value in sums.statistics.items()}
        num_items, rows = float(sums.normalisers[0]), found["rows"]
        rollout, self.rollout_seconds = self.rollout_seconds, 0.0
        return {
            "train/loss": ratio(sums.objective, sums.steps),
            "train/loss_policy": ratio(float(sums.numerators[0]), num_items),
            "train/kl": ratio(float(sums.numerators[1]), num_items),
            "train/reward": ratio(found["reward"], num_items),
            "train/groups_with_target": ratio(found["holds_target"], rows),
            "train/groups_without_spread": ratio(found["flat"], rows),
            "speed/rollout_seconds": ratio(rollout, sums.steps),
            "speed/update_seconds": ratio(seconds - rollout, sums.steps),
            "speed/target_tokens_per_second": found["tokens"] / seconds,
            "speed/tokens_per_second": found["input_tokens"] / seconds,
            "speed/rows_per_second": rows / seconds,
        }
