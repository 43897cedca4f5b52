"""Long titles cut at a word, so that one of them does not take the room of every history."""

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.items.as_text import encode
from igd_ds.items.catalogue import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_cut_titles(
    dataset: InteractionDataset, tokenizer: "PreTrainedTokenizerBase", max_title_tokens: int
) -> InteractionDataset:
    """Return the dataset with titles of at most `max_title_tokens` tokens; 0 cuts none.

    Raises:
        UsageError: not even one character of a title fits.
    """
    if not max_title_tokens:
        return dataset
    return dataclasses.replace(
        dataset, titles=cut_titles(dataset.titles, tokenizer, max_title_tokens)
    )


def cut_titles(
    titles: Sequence[str | None], tokenizer: "PreTrainedTokenizerBase", most: int
) -> list[str | None]:
    """Cut titles at a word so that title + newline has at most `most` tokens.

    Different titles stay different: where two would be cut to the same text, the second one ends in
    " (2)". A title without a space that fits is cut behind a character.

    Args:
        titles: N titles, or None.
        tokenizer: a Hugging Face tokenizer.
        most: at least 1.

    Raises:
        UsageError: not even one character of a title fits.

    Example:
        >>> cut_titles(["A Very Long Title, Volume 1", "Dune"], tokenizer, 4)
        ['A Very Long', 'Dune']
    """
    _, lengths = tokenize(
        titles, lambda title: "" if title is None else title + "\n", tokenizer, as_text=True
    )
    too_long = set(np.flatnonzero(lengths > most).tolist())

    # Which title each text stands for; the titles that stay come first.
    stands_for = {title: title for item, title in enumerate(titles) if item not in too_long}
    cut_of: dict[str | None, str] = {}
    next_number: dict[str, int] = {}

    found = list(titles)
    for item in sorted(too_long):
        title = found[item]
        assert title is not None, "no title has no tokens"
        if title not in cut_of:
            plain = _cut(title, "", tokenizer, most)
            for number in count(next_number.get(plain, 1)):
                text = plain if number == 1 else _cut(title, f" ({number})", tokenizer, most)
                if text not in stands_for:
                    break
            next_number[plain] = number + 1
            stands_for[text] = title
            cut_of[title] = text
        found[item] = cut_of[title]
    return found


def _cut(title: str, ending: str, tokenizer: "PreTrainedTokenizerBase", most: int) -> str:
    """Return the longest beginning of a title that fits with `ending` behind it."""

    def is_too_long(end: int) -> bool:
        text = title[:end] + ending + "\n"
        return len(encode([text], tokenizer, as_text=True)[0]) > most

    words = [match.end() for match in re.finditer(r"\S+", title)] or [len(title)]
    end = _last_that_fits(words, is_too_long) or _last_that_fits(range(1, words[0]), is_too_long)
    if not end:
        raise UsageError(
            f"--max_title_tokens {most} is too small: not one character of the title "
            f"{title[:60]!r} fits; raise it"
        )
    return title[:end] + ending


def _last_that_fits(ends: Sequence[int], is_too_long: Callable[[int], bool]) -> int:
    """Return the last of ascending `ends` that is not too long, or 0."""
    place = bisect_left(ends, True, key=is_too_long)
    return ends[place - 1] if place else 0
