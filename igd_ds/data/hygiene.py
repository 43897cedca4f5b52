"""Title hygiene: repair what scraping did to titles, and give a name to items that have none.

Steps, in this order, each counted in the report with examples:

* `entities`: HTML entities that end in a semicolon become characters, repeatedly, for `&amp;amp;` happens. Without semicolon
  nothing is touched: HTML would turn "Food&notes" into "Food¬es".
* `markup`: HTML tags, left-over attributes (`class="a-size"`) and the tail of a broken tag (`" />`) go. Tags are known by
  name, so "I <3 You" and an inch mark stay.
* `whitespace`: tabs, newlines, runs of spaces become one space; control characters, unpaired surrogates and invisible marks
  go. (Zero-width joiners stay: Persian, Hindi and emoji are spelled with them.)

A title is *unusable* when it is null, empty after these steps, a page's style sheet or script, or nothing but the name of an
Amazon department after a broken tag was cut off it (`Industrial & Scientific" />`). What happens to these items is a policy:

* `placeholder` (default): the item gets a title of its own, "Untitled item 3f9a1c04". The item stays in histories and targets,
  so rows, row_ids and the catalogue's ids are the same with hygiene on or off, and numbers stay comparable. Leaving the
  broken title would merge 27 different items into one leaf. The digits are a salted hash of the item id: ids are numbered by
  first appearance in most data, so a plain number would tell the model about order.
* `drop`: the item and its interactions are removed before the protocol makes rows; item ids close ranks.
* `d3`: the rule of D3's published script in place of ours, with `drop`. An item has a title, without `<span id`; `&quot;` and
  `&amp;` become characters, spaces and then quotes are stripped at both ends; what is left has 2 characters or more and at most
  20 words between single spaces.
* `verbatim`: titles stay as they are, missing ones too (a catalogue of semantic IDs needs none).

Titles that several items share stay as they are and are counted: the trie gives such items one leaf.
"""

import hashlib
import html
import html.entities
import re
from collections import Counter
from collections.abc import Callable, Sequence

from igd_ds.errors import UsageError

POLICIES = ("placeholder", "drop", "d3", "verbatim")
D3_MAX_WORDS = 20
PLACEHOLDER_SALT = "igd_ds untitled item "
MAX_UNESCAPES = 5  # deepest nesting of &amp;amp; that is followed (assumed)
NUM_EXAMPLES = 5

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_BLOCK_NAMES = "br|div|h[1-6]|hr|img|li|meta|ol|p|table|td|tr|ul"
_NAMES = f"{_BLOCK_NAMES}|a|b|big|em|font|i|input|link|script|small|span|strong|style|sub|sup|u"
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCK_NAMES})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_NAMES})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ATTRIBUTE = re.compile(
    r'\b(?:alt|class|content|data-[a-z-]+|href|id|name|src|style)="[^"<>]*"\s*/?>?'
)
_OPEN_TAG_TAIL = re.compile(rf"<(?:{_NAMES})\s+[a-z-]+=[^<>]*$", re.IGNORECASE)
_TAIL = re.compile(r"[\"']?\s*/>\s*$")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
# What any of the steps or _CODE needs to find something: titles without it, nearly all, are clean as they are.
_SUSPECT = re.compile(r'[&<>"={]|[^\S ]|  |\A | \Z|' + _INVISIBLE.pattern)
_CODE = re.compile(r"\bvar \w+ ?=|\bfunction ?\w* ?\([^()]*\) ?\{|[.#][\w-]+[^{}]*\{[^{}]*:")
# The departments of Amazon's 2014 and 2018 releases, as their pages' broken keyword tags spell them.
_DEPARTMENTS = re.compile(
    r"all beauty|amazon fashion|appliances|arts, crafts & sewing|automotive|baby|beauty|books|cds & vinyl|"
    r"cell phones & accessories|clothing, shoes & jewelry|digital music|electronics|gift cards|"
    r"grocery & gourmet food|handmade|health & personal care|home & kitchen|industrial & scientific|kindle store|"
    r"luxury beauty|magazine subscriptions|movies & tv|musical instruments|office products|patio, lawn & garden|"
    r"pet supplies|prime pantry|software|sports & outdoors|tools & home improvement|toys & games|video games",
    re.IGNORECASE,
)


def unescape_entities(text: str) -> str:
    """Replace HTML entities by their characters, at most MAX_UNESCAPES levels deep."""
    for _ in range(MAX_UNESCAPES):
        replaced = _ENTITY.sub(lambda match: _character(match[0]), text)
        if replaced == text:
            break
        text = replaced
    return text


def _character(entity: str) -> str:
    known = (
        entity[1] == "#" or entity[1:] in html.entities.html5
    )  # html.unescape would read "&notit;" as "¬it;"
    return html.unescape(entity) if known else entity


def strip_markup(text: str) -> str:
    """Remove HTML tags, left-over attributes and the tail of a broken tag."""
    text = _TAG.sub("", _BLOCK_TAG.sub(" ", text))
    return _TAIL.sub("", _OPEN_TAG_TAIL.sub("", _ATTRIBUTE.sub("", text)))


def collapse_whitespace(text: str) -> str:
    """Make every run of white space one space, strip both ends, remove invisible characters."""
    return " ".join(_INVISIBLE.sub("", text).split())


STEPS: dict[str, Callable[[str], str]] = {
    "entities": unescape_entities,
    "markup": strip_markup,
    "whitespace": collapse_whitespace,
}


def clean_title(title: str | None) -> tuple[str | None, list[str]]:
    """Return (clean title, or None where it is unusable; names of the steps that changed something)."""
    if title is None:
        return None, []
    if title and not _SUSPECT.search(title):
        return title, []
    changed = []
    for name, step in STEPS.items():
        cleaned = step(title)
        if cleaned != title:
            changed.append(name)
        title = cleaned
    department = "markup" in changed and _DEPARTMENTS.fullmatch(title)
    return (None if not title or department or _CODE.search(title) else title), changed


def d3_title(title: str | None) -> tuple[str | None, list[str]]:
    """Return (the title by D3's rule, or None where it leaves the item out; ["entities"] or ["whitespace"] where it changed)."""
    if title is None or "<span id" in title:
        return None, []
    unescaped = title.replace("&quot;", '"').replace("&amp;", "&")
    stripped = unescaped.strip(" ").strip('"')
    usable = len(stripped) > 1 and len(stripped.split(" ")) <= D3_MAX_WORDS
    changed = ["entities"] * (unescaped != title) + ["whitespace"] * (stripped != unescaped)
    return (stripped if usable else None), changed


def clean_titles(
    titles: Sequence[str | None], policy: str = "placeholder"
) -> tuple[list[str | None], dict]:
    """Clean a catalogue's titles; return (titles, report).

    With policy `placeholder` every title is usable afterwards; with `drop` and `d3` unusable ones are None and the caller removes
    these items. The report holds, per step and for `unusable`, a count and up to NUM_EXAMPLES examples [item id, before, after].
    """
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r} for titles; known: {', '.join(POLICIES)}")
    if policy == "verbatim":
        return list(titles), {"policy": policy, "items_sharing_a_title": _shared(titles)}
    found: dict[str, list] = {name: [] for name in (*STEPS, "unusable")}
    cleaned: list[str | None] = []
    clean_one = d3_title if policy == "d3" else clean_title
    for item, title in enumerate(titles):
        clean, changed = clean_one(title)
        cleaned.append(clean)
        for name in changed if clean is not None else ["unusable"]:
            found[name].append(item)
    if policy == "placeholder":
        for item, name in _placeholders(found["unusable"], set(cleaned)).items():
            cleaned[item] = name
    report: dict = {"policy": policy, "items_sharing_a_title": _shared(cleaned)}
    for name, items in found.items():
        examples = [
            [item, _printable(titles[item]), _printable(cleaned[item])]
            for item in items[:NUM_EXAMPLES]
        ]
        report[name] = {"count": len(items), "examples": examples}
    return cleaned, report


def _shared(titles: Sequence[str | None]) -> int:
    return sum(count for title, count in Counter(titles).items() if count > 1 and title is not None)


def _printable(title: str | None) -> str | None:
    return None if title is None else title.encode("utf-8", "replace").decode("utf-8")


def _placeholders(items: list[int], taken: set[str | None]) -> dict[int, str]:
    """Return {item id: a title that no other item has}: as many hash digits as it takes, the same number for all."""
    digests = [hashlib.sha256(f"{PLACEHOLDER_SALT}{item}".encode()).hexdigest() for item in items]
    for digits in range(8, 65):
        names = [f"Untitled item {digest[:digits]}" for digest in digests]
        if len(set(names)) == len(names) and taken.isdisjoint(names):
            break
    return dict(zip(items, names, strict=True)) if items else {}
