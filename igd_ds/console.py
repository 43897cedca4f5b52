"""What a run shows on the console: its header, its progress bar, the time it will take."""

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from igd_ds import distributed

TIMED_STEPS = 5
"""Optimizer steps, after the first one, from which the duration of a training is estimated."""

BAR_FORMAT = (
    "{desc}{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
)


def header(facts: Mapping[str, str]) -> str:
    """Return the lines that a run begins with: one per fact, names aligned.

    Example:
        >>> print(header({"dataset": "DATASET", "ranks": "2"}))
        dataset  DATASET
        ranks    2
    """
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def duration(seconds: float) -> str:
    """Return a duration as people say it.

    Example:
        >>> [duration(seconds) for seconds in (42, 600, 9000, 200_000)]
        ['42 s', '10 min', '2 h 30 min', '2 d 8 h']
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def progress_bar(**settings: Any) -> "tqdm[Any]":
    """Return a bar that rank 0 shows, unless the run is quiet; a log file gets a line now and then.

    A notebook shows it as a line of text, which needs no widgets.

    Args:
        settings: arguments of tqdm.
    """
    hidden = distributed.is_quiet() or not distributed.is_main()
    is_watched = sys.stderr.isatty() or in_notebook()
    return tqdm(disable=hidden, mininterval=1.0 if is_watched else 30.0, **settings)


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel; its stderr is no terminal."""
    return "ipykernel" in sys.modules


class Progress:
    """The progress of a training: a bar with epoch, loss and time left, and an estimate in words.

    The bar ends where early stopping would end the training if no later validation improved on the
    best one so far. With each improvement its end moves on, up to the last step.

    Args:
        total: optimizer steps at most.
        done: steps made before this start.
        steps_per_epoch: optimizer steps of an epoch.
        validate_every: steps between validations.
        patience: validations without improvement that end the training; 0: never.
    """

    def __init__(
        self, total: int, done: int, steps_per_epoch: int, validate_every: int, patience: int
    ):
        self.total, self.steps_per_epoch = total, steps_per_epoch
        self.validate_every, self.patience = validate_every, patience
        self._seconds: list[float] = []
        self._bar = progress_bar(total=total, initial=done, unit="step", bar_format=BAR_FORMAT)

    def end(self, best_step: int | None) -> int:
        """Return the step at which the training ends if no later validation improves.

        Args:
            best_step: step of the best validation; None before the first one, which is the best.
        """
        if not self.patience:
            return self.total
        best = self.validate_every if best_step is None else best_step
        return min(self.total, best + self.patience * self.validate_every)

    def update(self, step: int, best_step: int | None, seconds: float) -> None:
        """Take note that `step` is done; after a few steps say how long the training will take.

        Args:
            step: steps made.
            best_step: as in `end`.
            seconds: duration of the step.
        """
        self._bar.total = self.end(best_step)
        self._bar.set_description_str(f"epoch {step / self.steps_per_epoch:.2f} ", refresh=False)
        self._bar.update()
        if len(self._seconds) > TIMED_STEPS:
            return
        self._seconds.append(seconds)
        if len(self._seconds) > TIMED_STEPS:
            mean = sum(self._seconds[1:]) / TIMED_STEPS  # the first step is slower
            distributed.say(self.estimate(step, self.end(best_step), mean))

    def estimate(self, step: int, end: int, seconds: float) -> str:
        """Return in words how long the training will take.

        Args:
            step: steps made.
            end: the step at which early stopping would end the training.
            seconds: of a step.
        """
        line = f"{seconds:.2g} s a step, without validations: {duration((end - step) * seconds)}"
        line += f" to step {end:,}"
        if end < self.total:
            line += (
                f", where training stops if validation does not improve, and at most "
                f"{duration((self.total - step) * seconds)} to step {self.total:,}"
            )
        return line

    def show_loss(self, loss: float) -> None:
        """Show the training loss, in nats."""
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
