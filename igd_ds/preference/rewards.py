"""The reward of a group's items: a name in REWARDS, or a function of the user's."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from igd_ds.data.dataset import Split
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.items.ids import ItemIds
from igd_ds.objectives.policy import REWARDS

MOST = 1e6
"""The largest reward, in size: its square is far from the largest float32."""

RewardFunction = Callable[[Sequence[str], str, str], float]


@dataclass(frozen=True)
class Reward:
    """Gives every item of a group its reward.

    Letters in shapes: B rows, G items of a group.
    """

    name: str
    """As --reward has it."""
    function: RewardFunction | None
    """The user's function; None for a name in REWARDS."""
    source_ids: Sequence[str]
    """The source's id of each item."""

    @classmethod
    def load(cls, name: str, dataset: str, split: Split) -> Reward:
        """Find a reward, and try a user's function on the first row of a split.

        Raises:
            UsageError: there is no such reward, or the function fails or does not return a finite
                number.
        """
        if name in REWARDS:
            return cls(name, None, ())
        reward = cls(name, _imported(name), ItemIds.read(dataset).source_ids)
        target = int(split.targets[0])
        for item in {target, 0, len(reward.source_ids) - 1}:
            reward.of_item(split.history(0), target, item)
        return reward

    def __call__(self, split: Split, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return the rewards of items (B, G) in the order of the search, float64 (B, G).

        Raises:
            UsageError: the function fails or does not return a finite number.
        """
        targets = split.targets[rows]
        if self.function is None:
            return REWARDS[self.name](items == targets[:, None])
        return np.array([
            [self.of_item(split.history(row), target, item) for item in group]
            for row, target, group in zip(rows, targets, items, strict=True)
        ])  # fmt: skip

    def of_item(self, history: np.ndarray, target: int, item: int) -> float:
        """Return the user's reward of one item, all by dense ids.

        Raises:
            UsageError: it is no number between −MOST and MOST, or the function raises an error.
        """
        assert self.function is not None, "REWARDS look at whole groups"
        names = self.source_ids
        arguments = [names[i] for i in history], names[target], names[item]
        asked = f"for the target {arguments[1]!r} and the item {arguments[2]!r}"
        try:
            value = self.function(*arguments)
        except (Exception, SystemExit) as error:
            raise UsageError(f"--reward {self.name} fails {asked}: {_told(error)}") from error
        is_number = isinstance(value, (Real, np.number)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= MOST:
            raise UsageError(
                f"--reward {self.name} returned {value!r} ({type(value).__name__}) {asked}: it "
                f"must return one number between −{MOST:,.0f} and {MOST:,.0f}"
            )
        return float(value)


def _told(error: BaseException) -> str:
    """Return an error of the user's code in one line, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} ({place.filename}, line {place.lineno})"


def _imported(name: str) -> RewardFunction:
    """Import a `module:function`; the working folder is searched too.

    Raises:
        UsageError: there is no such function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(
            f"--reward {name}: unknown{did_you_mean(name, REWARDS)} (known: {', '.join(REWARDS)}, "
            "or module:function)"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--reward {name}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward {name} cannot be imported: {_told(error)}") from error
    if not callable(found):
        raise UsageError(f"--reward {name}: it is a {type(found).__name__}, not a function")
    return found
