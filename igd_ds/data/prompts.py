"""Prompts: a template and a user's history become token ids.

A prompt is prefix + item + separator + item + … + suffix. Each of these segments is tokenized once, on its own, and the ids are
joined; the target's ids come from the catalogue. So no string is tokenized twice, and prompt and target can never drift apart.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from igd_ds.errors import UsageError
from igd_ds.items.catalogue import tokenize

TEMPLATE_FOLDER = Path(__file__).parent / "templates"
NO_HISTORY = "unknown"  # stands in the history's place in CFT's null prompt, as published


@dataclass(frozen=True)
class Template:
    """The four texts of a prompt; `{domain}` may stand in prefix and suffix, `{item}` must stand in item."""

    prefix: str
    item: str
    separator: str
    suffix: str

    @classmethod
    def load(cls, name: str) -> "Template":
        """Read a template by its name in `igd_ds/data/templates` or by the path of a YAML file; ValueError if it is not one."""
        path = Path(name) if name.endswith((".yaml", ".yml")) else TEMPLATE_FOLDER / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in TEMPLATE_FOLDER.glob("*.yaml")))
            raise UsageError(
                f"--prompt: no template '{name}'; known names: {known}; or give the path of a .yaml file"
            )
        return cls.from_dict(yaml.safe_load(path.read_text()), str(path))

    @classmethod
    def from_dict(cls, values: dict, source: str) -> "Template":
        """Build a template from its four keys; `source` is named in the ValueError."""
        keys = ["prefix", "item", "separator", "suffix"]
        if (
            not isinstance(values, dict)
            or sorted(values) != sorted(keys)
            or not all(isinstance(v, str) for v in values.values())
        ):
            raise UsageError(f"{source}: a prompt template has exactly the texts {', '.join(keys)}")
        if "{item}" not in values["item"]:
            raise UsageError(f"{source}: 'item' must contain {{item}}")
        return cls(**values)

    def as_dict(self) -> dict[str, str]:
        """Return the four texts, as `from_dict` takes them."""
        return asdict(self)


@dataclass(frozen=True)
class PromptBuilder:
    """Token ids of every segment of a template over one dataset.

    `item_tokens` int32 (S,) holds all items' segments one after the other, item i's at `item_offsets[i] : item_offsets[i+1]`
    (int64, (N+1,)). `budget` is the longest prompt allowed, in tokens; `begin` starts with BOS where the tokenizer adds one.
    `null` is the whole prompt with NO_HISTORY for an item: one unknown token where the tokenizer has no words.
    """

    begin: np.ndarray
    separator: np.ndarray
    end: np.ndarray
    item_tokens: np.ndarray
    item_offsets: np.ndarray
    budget: int
    null: np.ndarray

    @classmethod
    def build(
        cls, template: Template, tokenizer, dataset, kind: str, budget: int
    ) -> "PromptBuilder":
        """Tokenize a template's segments.

        Raises:
            ValueError: one item with the frame around it exceeds `budget` tokens, or the tokenizer knows nothing of a segment.
        """
        unknown = tokenizer.unk_token_id

        def ids(text: str, may_be_unknown: bool = False) -> np.ndarray:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            if set(found) == {unknown} and not may_be_unknown:
                raise UsageError(
                    f"--prompt: the tokenizer has no token for the template's {text[:60]!r}; with codes alone take --prompt codes"
                )
            return np.array(found, dtype=np.int32)

        domain = dataset.info["domain"]
        # What the tokenizer puts before a text is BOS; what it may put behind (EOS) has no place before the target.
        with_special = tokenizer("a")["input_ids"]
        bos = (
            [tokenizer.bos_token_id]
            if with_special and with_special[0] == tokenizer.bos_token_id
            else []
        )
        texts = (
            dataset.titles if kind == "text" else ["".join(codes) for codes in dataset.semantic_ids]
        )
        item_tokens, lengths = tokenize(
            texts, lambda text: template.item.replace("{item}", text), tokenizer
        )
        ids(template.item.replace("{item}", ""))  # the frame around an item has to be known too
        nothing = ids(template.item.replace("{item}", NO_HISTORY), may_be_unknown=True)
        if not len(nothing):  # the tokenizer passes over what it does not know
            nothing = np.array(
                [tokenizer.pad_token_id if unknown is None else unknown], dtype=np.int32
            )
        begin = np.concatenate(
            [np.array(bos, dtype=np.int32), ids(template.prefix.replace("{domain}", domain))]
        )
        end = ids(template.suffix.replace("{domain}", domain))
        builder = cls(
            begin=begin,
            separator=ids(template.separator),
            end=end,
            item_tokens=item_tokens,
            item_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            budget=budget,
            null=np.concatenate([begin, nothing, end]),
        )
        longest = int(np.argmax(lengths))
        needed = len(builder.begin) + len(builder.end) + int(lengths[longest])
        if needed > budget:
            raise UsageError(
                f"--max_length leaves {budget} tokens for the prompt, but the template with item {longest} "
                f"({texts[longest][:60]!r}…, {lengths[longest]} tokens) alone takes {needed}: raise --max_length or drop the item"
            )
        return builder

    def num_kept(self, history: np.ndarray) -> int:
        """Return how many of the newest items of `history` (item ids, oldest first) fit the budget."""
        costs = self.item_offsets[history + 1] - self.item_offsets[history] + len(self.separator)
        room = self.budget - len(self.begin) - len(self.end) + len(self.separator)
        return int(np.searchsorted(np.cumsum(costs[::-1]), room, side="right"))

    def encode(self, history: np.ndarray) -> np.ndarray:
        """Return the prompt's token ids, int32, at most `budget` long; whole items are dropped from the oldest on to fit."""
        parts = [self.begin]
        for item in history[len(history) - self.num_kept(history) :]:
            parts += [
                self.item_tokens[self.item_offsets[item] : self.item_offsets[item + 1]],
                self.separator,
            ]
        if len(parts) > 1:
            parts.pop()
        return np.concatenate([*parts, self.end])

    def lengths(self, split) -> np.ndarray:
        """Return the prompt length in tokens of every row of a split, int64 (R,), without building the prompts.

        Exact for rows that fit the budget; a row that must be cut is given the budget (an upper bound, for grouping only).
        """
        costs = np.diff(self.item_offsets)[split.history_items] + len(self.separator)
        totals = np.concatenate([[0], np.cumsum(costs)])
        history = totals[split.history_offsets[1:]] - totals[split.history_offsets[:-1]]
        return np.minimum(
            len(self.begin) + len(self.end) + history - len(self.separator) * (history > 0),
            self.budget,
        )
