"""Prompts: a template and a user's history become token ids.

A prompt is prefix + item + separator + item + … + suffix. Each of these segments is tokenized once,
on its own, and the ids are joined. The ids of the target come from the catalogue. No string is
tokenized twice, so the prompt and the target cannot disagree about the tokens of an item.

Special tokens in a template are control tokens; in a title they are text.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from igd_ds.config.yaml_files import read_yaml_file
from igd_ds.data.chat import CHAT, chat_texts
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.errors import UsageError
from igd_ds.items.as_text import control_tokens
from igd_ds.items.catalogue import item_paths, tokenize

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
NO_HISTORY = "unknown"  # replaces the history in CFT's null prompt, as published

AS_TARGET = "{target}"
"""The `item` of a template that writes items in the history exactly as the catalogue has them."""

PLACEHOLDERS = {
    "prefix": {"domain", "eos"},
    "item": {"item", "target"},
    "separator": set(),
    "suffix": {"domain"},
}
"""The words in braces that each text of a template may hold."""


@dataclass(frozen=True)
class Template:
    """The four texts of a prompt.

    `{domain}` may occur in `prefix` and `suffix`, `{eos}` in `prefix`. `{item}` must occur in
    `item`, or `item` is `{target}`: the item's tokens as the model writes them, with EOS.

    Example:
        >>> Template.load("short").item
        '{item}'
    """

    prefix: str
    item: str
    separator: str
    suffix: str

    @classmethod
    def load(cls, name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> "Template":
        """Read a template by its name in `igd_ds/data/templates`, or by the path of a YAML file.

        The name "chat" makes one of the tokenizer's own chat template.

        Raises:
            UsageError: there is no such template, the file is not one, or it holds an unknown
                {word}.
        """
        if name == CHAT and tokenizer is not None:
            return cls(**chat_texts(tokenizer))

        path = Path(name) if name.endswith((".yaml", ".yml")) else TEMPLATE_FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted([CHAT, *(p.stem for p in TEMPLATE_FOLDER.glob("*.yaml"))]))
            raise UsageError(
                f"--prompt: no template '{name}'; known names: {known}; or give the path of a "
                ".yaml file"
            )
        template = cls.from_dict(read_yaml_file(path), str(path))
        template._check_words(str(path))
        return template

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "Template":
        """Build a template from parsed YAML or JSON.

        Raises:
            UsageError: the value is not a dict of exactly the four texts; the message names
                `source`.
        """
        keys = ["prefix", "item", "separator", "suffix"]
        if (
            not isinstance(values, dict)
            or set(values) != set(keys)
            or not all(isinstance(text, str) for text in values.values())
        ):
            raise UsageError(f"{source}: a prompt template has exactly the texts {', '.join(keys)}")
        if "{item}" not in values["item"] and values["item"] != AS_TARGET:
            raise UsageError(f"{source}: 'item' must contain {{item}}, or be {AS_TARGET} alone")
        if AS_TARGET in values["item"] and values["item"] != AS_TARGET:
            raise UsageError(
                f"{source}: {AS_TARGET} in 'item' is the item with its EOS and stands alone: put "
                "other text into 'separator'"
            )
        return cls(**values)

    def _check_words(self, source: str) -> None:
        """Raise UsageError if a text holds a {word} that nothing replaces."""
        for key, text in asdict(self).items():
            for word in re.findall(r"\{(\w+)\}", text):
                if word not in PLACEHOLDERS[key]:
                    known = (
                        ", ".join(f"{{{known}}}" for known in sorted(PLACEHOLDERS[key])) or "none"
                    )
                    raise UsageError(
                        f"{source}: '{key}' holds {{{word}}}, which nothing replaces; known there: "
                        f"{known}. The history needs no word: it stands between prefix and suffix"
                    )

    def as_dict(self) -> dict[str, str]:
        """Return the four texts, as `from_dict` takes them."""
        return asdict(self)


@dataclass(frozen=True)
class PromptBuilder:
    """Token ids of every segment of a template over one dataset.

    Example:
        >>> prompts = PromptBuilder.build(Template.load("short"), tokenizer, dataset, "text", 512)
        >>> prompts.encode(dataset.splits["test"].history(0))  # int32, at most 512 ids
    """

    begin: np.ndarray
    """int32: what the tokenizer puts before a text (BOS), once, and the prefix."""
    separator: np.ndarray
    """int32."""
    end: np.ndarray
    """int32: the suffix."""
    item_tokens: np.ndarray
    """int32 (S,): the segments of all items, one after the other."""
    item_offsets: np.ndarray
    """int64 (N + 1,): the segment of item i is `item_tokens[offsets[i] : offsets[i + 1]]`."""
    budget: int
    """The longest prompt that is allowed, in tokens."""
    null: np.ndarray
    """int32: the whole prompt with NO_HISTORY as its only item. A tokenizer without words gives one
    unknown token instead."""

    @classmethod
    def build(
        cls,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        dataset: InteractionDataset,
        kind: str,
        budget: int,
    ) -> "PromptBuilder":
        """Tokenize the segments of a template.

        Args:
            template: the four texts.
            tokenizer: a Hugging Face tokenizer.
            dataset: its items and its domain are used.
            kind: "text" puts titles into the prompt, "semantic-id" puts codes.
            budget: the longest prompt that is allowed, in tokens.

        Raises:
            UsageError: one item and the frame around it exceed `budget` tokens, or the tokenizer
                has no token for a segment of the template.
        """
        unknown = tokenizer.unk_token_id

        def ids(text: str) -> np.ndarray:
            return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

        def known_ids(text: str) -> np.ndarray:
            found = ids(text)
            if set(found.tolist()) == {unknown}:
                raise UsageError(
                    f"--prompt: the tokenizer has no token for the template's {text[:60]!r}; with "
                    "codes alone take --prompt codes"
                )
            return found

        # The frame: what stands before, between, behind and around the items.
        domain, eos = dataset.info["domain"], [tokenizer.eos_token_id]
        first, *others = template.prefix.replace("{domain}", domain).split("{eos}")
        prefix = known_ids(first)
        for text in others:
            prefix = np.concatenate([prefix, eos, known_ids(text)]).astype(np.int32)
        texts = _item_texts(dataset, kind)
        begin = _joined(_beginning(tokenizer, ["a", *texts[:1]]), prefix)
        separator = known_ids(template.separator)
        end = known_ids(template.suffix.replace("{domain}", domain))

        # The items.
        as_target = template.item == AS_TARGET
        if as_target:
            item_tokens, offsets = item_paths(dataset, tokenizer, kind)
            lengths = np.diff(offsets)
        else:
            known_ids(template.item.replace("{item}", ""))
            item_tokens, lengths = _written(template.item, texts, tokenizer, kind == "text")

        # The prompt without history.
        nothing = ids(NO_HISTORY if as_target else template.item.replace("{item}", NO_HISTORY))
        if not len(nothing):  # the tokenizer skips what it does not know
            filler = tokenizer.pad_token_id if unknown is None else unknown
            nothing = np.array([filler], dtype=np.int32)
        if as_target:
            nothing = np.append(nothing, eos).astype(np.int32)

        longest = int(np.argmax(lengths))
        needed = len(begin) + len(end) + int(lengths[longest])
        if needed > budget:
            raise UsageError(
                f"--max_length leaves {budget} tokens for the prompt, but the template with item "
                f"{longest} ({texts[longest][:60]!r}…, {lengths[longest]} tokens) alone takes "
                f"{needed}: raise --max_length, or cut long titles with --max_title_tokens"
            )
        return cls(
            begin=begin,
            separator=separator,
            end=end,
            item_tokens=item_tokens,
            item_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            budget=budget,
            null=np.concatenate([begin, nothing, end]),
        )

    def num_kept(self, history: np.ndarray) -> int:
        """Return how many of the newest items of a history (item ids, oldest first) fit."""
        costs = self.item_offsets[history + 1] - self.item_offsets[history] + len(self.separator)
        room = self.budget - len(self.begin) - len(self.end) + len(self.separator)
        return int(np.searchsorted(np.cumsum(costs[::-1]), room, side="right"))

    def rows_kept(self, split: Split) -> np.ndarray:
        """Return `num_kept` of every row's history, int64 (R,), without a loop over rows."""
        costs = np.diff(self.item_offsets)[split.history_items] + len(self.separator)
        totals = np.concatenate([[0], np.cumsum(costs)])
        begin, end = split.history_offsets[:-1], split.history_offsets[1:]
        room = self.budget - len(self.begin) - len(self.end) + len(self.separator)
        first = np.searchsorted(totals, totals[end] - room, side="left")
        return end - np.clip(first, begin, end)

    def describe_cuts(self, split: Split, longest_item: int) -> str:
        """Return a line on how many rows of a split are cut, and how many items are kept.

        Args:
            split: its rows are counted.
            longest_item: tokens of the longest target, for which every prompt leaves room.
        """
        length, kept = np.diff(split.history_offsets), self.rows_kept(split)
        num_cut = int(np.count_nonzero(kept < length))
        line = (
            f"{num_cut:,} of {len(split):,} rows of {split.name} cut to "
            f"{self.budget} tokens, mean items kept {kept.mean():.2f} of {length.mean():.2f}"
        )
        if num_cut:
            line += (
                f"; every prompt leaves room for the longest item, {longest_item} tokens: "
                "--max_title_tokens cuts long titles, --max_length makes room"
            )
        return line

    def encode(self, history: np.ndarray) -> np.ndarray:
        """Return the token ids of a prompt, int32, at most `budget` long.

        If the history (item ids, oldest first) does not fit, whole items are dropped from its old
        end.
        """
        parts = [self.begin]
        for place, item in enumerate(history[len(history) - self.num_kept(history) :]):
            if place:
                parts.append(self.separator)
            parts.append(self.item_tokens[self.item_offsets[item] : self.item_offsets[item + 1]])
        return np.concatenate([*parts, self.end])

    def refuse_empty_prompts(self, split: Split) -> None:
        """Raise UsageError if a row has no history and its prompt therefore no token.

        Nothing would predict the first token of its target.
        """
        empty = np.flatnonzero(self.lengths(split) == 0)
        if len(empty):
            raise UsageError(
                f"row {empty[0]} of {split.name} ({len(empty):,} in all) has no history, and the "
                "prompt then has no token: leave such rows out, or take another --prompt"
            )

    def lengths(self, split: Split) -> np.ndarray:
        """Return the prompt length of every row in tokens, int64 (R,), without building prompts.

        The length is exact for rows that fit the budget. For a row that must be cut, the result is
        the budget: an upper bound, good enough to group rows by length.
        """
        costs = np.diff(self.item_offsets)[split.history_items] + len(self.separator)
        totals = np.concatenate([[0], np.cumsum(costs)])
        history = totals[split.history_offsets[1:]] - totals[split.history_offsets[:-1]]

        frame = len(self.begin) + len(self.end)
        surplus = len(self.separator) * (history > 0)  # there is none behind the last item
        return np.minimum(frame + history - surplus, self.budget)


def _beginning(tokenizer: PreTrainedTokenizerBase, probes: Sequence[str]) -> np.ndarray:
    """Return what the tokenizer puts before a text, int32: BOS, two tokens (GLM), or nothing.

    What it may put behind a text (EOS) has no place before the target.

    Args:
        tokenizer: a Hugging Face tokenizer.
        probes: texts; the first one that the tokenizer can write is looked at.
    """
    for probe in probes:
        whole = tokenizer(probe)["input_ids"]
        own = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if not own or tokenizer.unk_token_id in own:
            continue
        places = [i for i in range(len(whole)) if whole[i : i + len(own)] == own]
        if places:
            return np.array(whole[: places[0]], dtype=np.int32)
    return np.empty(0, np.int32)


def _joined(beginning: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """Return both one after the other; what the prefix repeats of the beginning stands once."""
    for count in range(min(len(beginning), len(prefix)), 0, -1):
        if np.array_equal(beginning[-count:], prefix[:count]):
            return np.concatenate([beginning, prefix[count:]])
    return np.concatenate([beginning, prefix])


def _without_control_tokens(item: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Cut a template's `item` into what ends in a control token, the rest, what begins in one."""
    first, last = item.index("{item}"), item.rindex("{item}")
    begin, end = 0, len(item)
    for name in control_tokens(tokenizer):
        before, behind = item.rfind(name, 0, first), item.find(name, last)
        begin = max(begin, before + len(name)) if before >= 0 else begin
        end = min(end, behind) if behind >= 0 else end
    return item[:begin], item[begin:end], item[end:]


def _written(
    form: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, are_titles: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all items as `form` writes them, int32, and their numbers, int64 (N,).

    Control tokens of the template stand before and behind the text of a title.
    """

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    before, behind = "", ""
    if are_titles:
        before, form, behind = _without_control_tokens(form, tokenizer)
    tokens, lengths = tokenize(
        texts, lambda text: form.replace("{item}", text), tokenizer, as_text=are_titles
    )
    return _surrounded(tokens, lengths, ids(before), ids(behind))


def _surrounded(
    tokens: np.ndarray, lengths: np.ndarray, before: np.ndarray, behind: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ragged `tokens` and `lengths` with `before` and `behind` around every part."""
    ends, num_parts = np.cumsum(lengths), len(lengths)
    # Where one part ends and the next begins, what stands behind the first one comes first.
    places = [np.repeat(ends, len(behind)), np.repeat(ends - lengths, len(before))]
    added = [np.tile(behind, num_parts), np.tile(before, num_parts)]
    tokens = np.insert(tokens, np.concatenate(places), np.concatenate(added))
    return tokens, lengths + len(before) + len(behind)


def _item_texts(dataset: InteractionDataset, kind: str) -> list[str]:
    """Return the text of each item: its title, or its codes one after the other."""
    if kind == "text":
        titles = [title for title in dataset.titles if title is not None]
        if len(titles) < dataset.num_items:
            raise UsageError("some items have no title: prepare the dataset with --titles")
        return titles
    if dataset.semantic_ids is None:
        raise UsageError("the dataset has no semantic IDs: make them with igd ids")
    return ["".join(codes) for codes in dataset.semantic_ids]
