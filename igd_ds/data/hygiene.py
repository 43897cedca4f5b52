"""Title hygiene: repair what web scraping did to titles, and name the items that have no title.

These steps run in this order. The report counts each step and shows examples:

* `entities`: HTML entities that end in a semicolon become characters. The step repeats, because
  `&amp;amp;` occurs. Entities without a semicolon stay: HTML would turn "Food&notes" into
  "Food¬es".
* `markup`: HTML tags, comments, scripts and style sheets, left-over attributes (`class="a-size"`)
  and the tail of a broken tag (`" />`) are removed. Tags are recognised by the names that HTML has,
  so that "I <3 You", "<Insert Name>" and an inch mark stay.
* `whitespace`: tabs, newlines and runs of spaces become one space. Control characters, unpaired
  surrogates and invisible marks are removed. Zero-width joiners stay: Persian, Hindi and emoji need
  them.

A title is *unusable* when it is null or empty after these steps, when it spells a missing value
(`nan`, `None`, `<NA>`; the report counts these as `missing_values` if there are any), when it is
the style sheet or script of a page, or when only the name of an Amazon department is left after a
broken tag was removed (`Industrial & Scientific" />`). The policy says what happens to items with
such a title:

* `placeholder` (default): the item gets a title of its own, "Untitled item 3f9a1c04". The item
  stays in histories and targets. Rows, row_ids and item ids are therefore the same with and without
  hygiene, and metrics stay comparable. The broken title itself would merge 27 different items into
  one trie leaf. The digits are a salted hash of the item id. The plain id would tell the model the
  order of the items, because most data sets number items by first appearance.
* `drop`: the item and its interactions are removed before the protocol makes rows. The remaining
  items are numbered anew.
* `d3`: like `drop`, with the rule of D3's published script instead of ours. An item has a title
  without `<span id`; `&quot;` and `&amp;` become characters; spaces and then quotes are stripped at
  both ends; the result has at least 2 characters and at most 20 words between single spaces.
  Spelled missing values count as titles there.
* `verbatim`: titles stay as they are, and missing titles stay missing (a catalogue of semantic IDs
  needs no titles).

Titles that several items share stay as they are, and the report counts them. The trie gives such
items one leaf.
"""

import hashlib
import html
import html.entities
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bleach.html5lib_shim import HTML_TAGS, HTML_TAGS_BLOCK_LEVEL
from html5lib import constants

from igd_ds.errors import UsageError

POLICIES = ("placeholder", "drop", "d3", "verbatim")
D3_MAX_WORDS = 20
PLACEHOLDER_SALT = "igd_ds untitled item "
MAX_UNESCAPES = 5  # the deepest nesting of &amp;amp; that is resolved (assumed)
NUM_EXAMPLES = 5
MISSING = "missing_values"

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

MISSING_VALUES = frozenset({
    "nan", "-nan", "1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "n/a", "#n/a", "#na", "#n/a n/a",
    "<na>", "<nan>", "nat", "<nat>", "none", "<none>", "null", "<null>", "(null)", "\\n", "n.a.",
    "n.a",
})  # fmt: skip
"""Titles that are no titles, in lower case: what programs and people write for a missing value."""

EXACT_MISSING_VALUES = frozenset({"NA", "undefined"})
"""The same, where the case matters: "Na" and "Undefined" are titles."""

# html5lib's own advice for its list of elements and CSS properties is another library, which would
# bring a sanitizer that we do not need.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from html5lib.filters import sanitizer

_HTML = constants.namespaces["html"]
_SPECIAL_NAMES = {name for space, name in constants.specialElements if space == _HTML}
_BLOCK_NAMES = (_SPECIAL_NAMES | HTML_TAGS_BLOCK_LEVEL) - {"wbr"}
HTML_NAMES = frozenset({
    *_BLOCK_NAMES,
    *HTML_TAGS,
    *(name for space, name in sanitizer.allowed_elements if space == _HTML),
    "blink", "math", "menuitem", "nobr", "rb", "rtc", "svg",
})  # fmt: skip
"""The names of all HTML elements, in lower case: html5lib has most of the older ones, bleach most
of the new; what both lack is listed here, with the two roots of embedded SVG and MathML."""

_SWITCHES = frozenset({
    *(name for names in constants.booleanAttributes.values() for name in names),
    "allowfullscreen", "compact", "declare", "formnovalidate", "hidden", "inert", "itemscope",
    "loop", "muted", "nohref", "nomodule", "noresize", "novalidate", "nowrap", "playsinline",
    "reversed",
})  # fmt: skip
"""Attributes without a value, in lower case: those of html5lib and those that it lacks."""


def _one_of(names: Iterable[str]) -> str:
    """Return a pattern that matches any of these names."""
    return f"(?:{'|'.join(sorted(map(re.escape, names)))})"


def _tag(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the tags with these names; words behind a name must be attributes."""
    name, switch = _one_of(names), _one_of(_SWITCHES)
    attributes = rf"\s[^<>=]*=[^<>]*|(?:\s+{switch})+"
    return re.compile(rf"<(?:/{name}\s*|{name}(?:{attributes})?\s*/?)>", re.IGNORECASE)


_BLOCK_TAG = _tag(_BLOCK_NAMES)
_TAG = _tag(HTML_NAMES)
_COMMENT = re.compile(
    r"<!--.*?(?:--!?>|\Z)|<!DOCTYPE[^<>]*>|<\?[a-z][^<>]*>|<!\[CDATA\[|\]\]>"
    r"|<(script|style)(?:\s[^<>]*)?>.*?(?:</\1\s*>|\Z)|<svg(?:\s[^<>]*)?>.*?</svg\s*>",
    re.IGNORECASE | re.DOTALL,
)
_ATTRIBUTE = re.compile(
    r'\b(?:alt|class|content|data-[a-z-]+|href|id|name|src|style)="[^"<>]*"\s*/?>?'
)
_OPEN_TAG_TAIL = re.compile(rf"<{_one_of(HTML_NAMES)}\s+[a-z-]+=[^<>]*$", re.IGNORECASE)
_TAIL = re.compile(r"[\"']?\s*/>\s*$")
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff]"
)
# Characters without which no step and no pattern below finds anything: most titles have none of
# them and are clean.
_SUSPECT = re.compile(r'[&<>"={]|[^\S ]|  |\A | \Z|' + _INVISIBLE.pattern)
# A rule of a style sheet: a selector (a class or an id, not "#1"), then a property that CSS knows,
# one of a known family ("border-radius"), or any property written without spaces.
_FAMILIES = {name.partition("-")[0] for name in sanitizer.allowed_css_properties if "-" in name}
_PROPERTY = (
    rf"(?:{_one_of(sanitizer.allowed_css_properties)}"
    rf"|(?:{_one_of(_FAMILIES | {'margin', 'padding'})})?-[a-z-]+|margin|padding)"
)
_SELECTOR = r"(?:^|[\s,}>])[.#]-?[A-Za-z_][\w-]*"
# JavaScript. A variable gets a literal, a call or a member of an object, or the statement ends in a
# semicolon, so that "var house = home" stays. Behind the brace of a function comes code, or the
# title ends, so that "The function (of) {life}" stays.
_VARIABLE = (
    r"\bvar [\w$]+ ?= ?(?:[\"'\d({\[!/-]|new |function\b|[\w$.]+[(\[;]|[\w$]+\.[\w$]|[^;]*;$)"
)
_FUNCTION = (
    r"(?:(?:^|[=(,;:!}]) ?function ?[\w$]*|\bfunction [\w$]+) ?\([\w$, ]*\) ?"
    r"\{ ?(?:$|\}|[^{}]*[;=(.])"
)
_CODE = re.compile(
    rf"{_VARIABLE}|{_FUNCTION}"
    rf"|{_SELECTOR}[^{{}}]*\{{\s*{_PROPERTY}\s*:|{_SELECTOR}\{{[a-z-]+:[^\s{{}}]"
)
# The departments of Amazon's 2014 and 2018 releases, as the broken keyword tags of the pages spell
# them.
_DEPARTMENTS = re.compile(
    r"all beauty|amazon fashion|appliances|arts, crafts & sewing|automotive|baby|beauty|books|"
    r"cds & vinyl|cell phones & accessories|clothing, shoes & jewelry|digital music|electronics|"
    r"gift cards|grocery & gourmet food|handmade|health & personal care|home & kitchen|"
    r"industrial & scientific|kindle store|luxury beauty|magazine subscriptions|movies & tv|"
    r"musical instruments|office products|patio, lawn & garden|pet supplies|prime pantry|software|"
    r"sports & outdoors|tools & home improvement|toys & games|video games",
    re.IGNORECASE,
)


def unescape_entities(text: str) -> str:
    """Replace HTML entities with their characters, at most MAX_UNESCAPES levels deep."""
    for _ in range(MAX_UNESCAPES):
        replaced = _ENTITY.sub(lambda match: _character(match[0]), text)
        if replaced == text:
            break
        text = replaced
    return text


def _character(entity: str) -> str:
    # html.unescape alone would read "&notit;" as "¬it;".
    known = entity[1] == "#" or entity[1:] in html.entities.html5
    return html.unescape(entity) if known else entity


def strip_markup(text: str) -> str:
    """Remove HTML tags, comments, scripts, left-over attributes and the tail of a broken tag."""
    text = _COMMENT.sub("", text)
    text = _TAG.sub("", _BLOCK_TAG.sub(" ", text))
    return _TAIL.sub("", _OPEN_TAG_TAIL.sub("", _ATTRIBUTE.sub("", text)))


def collapse_whitespace(text: str) -> str:
    """Replace every run of white space with one space, strip both ends, remove invisible marks."""
    return " ".join(_INVISIBLE.sub("", text).split())


STEPS: dict[str, Callable[[str], str]] = {
    "entities": unescape_entities,
    "markup": strip_markup,
    "whitespace": collapse_whitespace,
}


def is_missing_value(title: str) -> bool:
    """Return whether a title only spells a missing value, as pandas, R or SQL write it.

    Example:
        >>> is_missing_value("NaN"), is_missing_value('"n.a."'), is_missing_value("Nancy")
        (True, True, False)
    """
    title = title.strip()
    if len(title) > 1 and title[0] == title[-1] and title[0] in "\"'":
        title = title[1:-1].strip()
    return title in EXACT_MISSING_VALUES or title.lower() in MISSING_VALUES


def clean_title(title: str | None) -> tuple[str | None, list[str]]:
    """Return the clean title (None if it is unusable) and the names of the steps that changed it.

    For a title that spells a missing value, the only name is MISSING.

    Example:
        >>> clean_title("Kane &amp; Abel")
        ('Kane & Abel', ['entities'])
    """
    if title is None:
        return None, []
    if is_missing_value(title):
        return None, [MISSING]
    if title and not _SUSPECT.search(title):
        return title, []

    changed = []
    for name, step in STEPS.items():
        cleaned = step(title)
        if cleaned != title:
            changed.append(name)
        title = cleaned

    if is_missing_value(title):
        return None, [MISSING]
    only_department = "markup" in changed and _DEPARTMENTS.fullmatch(title)
    unusable = not title or only_department or _CODE.search(title)
    return (None if unusable else title), changed


def d3_title(title: str | None) -> tuple[str | None, list[str]]:
    """Return the title by D3's rule, or None if D3 drops the item, and what the rule changed.

    The changes are named "entities" and "whitespace".
    """
    if title is None or "<span id" in title:
        return None, []
    unescaped = title.replace("&quot;", '"').replace("&amp;", "&")
    stripped = unescaped.strip(" ").strip('"')
    usable = len(stripped) > 1 and len(stripped.split(" ")) <= D3_MAX_WORDS
    changed = ["entities"] * (unescaped != title) + ["whitespace"] * (stripped != unescaped)
    return (stripped if usable else None), changed


def clean_titles(
    titles: Sequence[str | None], policy: str = "placeholder"
) -> tuple[list[str | None], dict[str, Any]]:
    """Clean the titles of a catalogue; return the titles and a report.

    With the policy `placeholder` every title is usable afterwards. With `drop` and `d3` unusable
    titles become None, and the caller removes these items.

    Returns:
        The titles, and the report: per step, for `unusable` and, if there are any, for
        `missing_values` it holds a count and up to NUM_EXAMPLES examples [item id, before, after].

    Raises:
        UsageError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r} for titles; known: {', '.join(POLICIES)}")
    if policy == "verbatim":
        return list(titles), {"policy": policy, "items_sharing_a_title": _num_sharing(titles)}

    found: dict[str, list[int]] = {name: [] for name in (*STEPS, "unusable", MISSING)}
    cleaned: list[str | None] = []
    clean_one = d3_title if policy == "d3" else clean_title
    for item, title in enumerate(titles):
        clean, changed = clean_one(title)
        cleaned.append(clean)
        if clean is None:
            changed = ["unusable", *(name for name in changed if name == MISSING)]
        for name in changed:
            found[name].append(item)
    if not found[MISSING]:
        del found[MISSING]  # the report of a data set without them has no such entry

    if policy == "placeholder":
        for item, name in _placeholders(found["unusable"], set(cleaned)).items():
            cleaned[item] = name

    report: dict[str, Any] = {"policy": policy, "items_sharing_a_title": _num_sharing(cleaned)}
    for name, items in found.items():
        examples = [
            [item, _printable(titles[item]), _printable(cleaned[item])]
            for item in items[:NUM_EXAMPLES]
        ]
        report[name] = {"count": len(items), "examples": examples}
    return cleaned, report


def _num_sharing(titles: Sequence[str | None]) -> int:
    """Count the items whose title another item has too."""
    return sum(count for title, count in Counter(titles).items() if count > 1 and title is not None)


def _printable(title: str | None) -> str | None:
    return None if title is None else title.encode("utf-8", "replace").decode("utf-8")


def _placeholders(items: list[int], taken: set[str | None]) -> dict[int, str]:
    """Return a title for each item that no other item has.

    All placeholders have the same number of hash digits: the smallest that makes them unique.
    """
    digests = [hashlib.sha256(f"{PLACEHOLDER_SALT}{item}".encode()).hexdigest() for item in items]
    for digits in range(8, 65):
        names = [f"Untitled item {digest[:digits]}" for digest in digests]
        if len(set(names)) == len(names) and taken.isdisjoint(names):
            break
    return dict(zip(items, names, strict=True)) if items else {}
