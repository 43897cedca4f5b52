"""Title hygiene: what it repairs, what it leaves alone, and items without a usable title."""

import json

import pytest

from igd_ds.data.hygiene import HTML_NAMES, clean_title, clean_titles
from igd_ds.errors import UsageError


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Kane &amp; Abel", "Kane & Abel"),
        ("&amp;amp;amp;quot;Star Trek&quot; Memories", '"Star Trek" Memories'),
        ("T&Uuml;RLEN &#8211; &#x41;", "TÜRLEN – A"),
        ("Smart Straw&nbsp;Sprays\t2\n ways ", "Smart Straw Sprays 2 ways"),
        ("zero\u200bwidth \ufeffmark\x07 so\u00adft", "zerowidth mark soft"),
        ("half an emoji \ud83d", "half an emoji"),
        ("<b>Bold</b> H<sub>2</sub>O<br/>new <I>line</I>", "Bold H2O new line"),
        ("&lt;span id=&quot;t&quot;&gt;Hidden&lt;/span&gt;", "Hidden"),
        ('class="a-size-large">Torch', "Torch"),
        ('Torch <span class="a-si', "Torch"),
        ('RapidFix, 25 mL,RFX7121100" />', "RapidFix, 25 mL,RFX7121100"),
        ("Was <s>$20</s> now $10", "Was $20 now $10"),
        ("<s>$20 mug", "$20 mug"),
        ("<del>Old</del> <mark>new</mark> <q>quote</q> <code>x</code>", "Old new quote x"),
        ('<STRIKE>a</STRIKE><font color="red">b</font><tt>c</tt>', "abc"),
        ("<section>One</section><main >two</main >", "One two"),
        ("&lt;s&gt;$20&lt;/s&gt; mug", "$20 mug"),
        ("super<wbr>cali<!-- a > b -->fragilistic", "supercalifragilistic"),
        ("Torch <!-- cut off", "Torch"),
        ("<td nowrap>Name</td>", "Name"),
        ("<BUTTON Disabled>Go</BUTTON>", "Go"),
        ("<video autoplay loop muted />Film", "Film"),
        ("<blink>New</blink> <nobr>lamp</nobr>", "New lamp"),
        ('<svg width="9"><path d="M0 0"/><title>icon</title></svg>Torch', "Torch"),
        ("<svg>Torch", "Torch"),
        ("<!DOCTYPE html><![CDATA[Torch]]>", "Torch"),
        ("<style>.a{b:c}</style>Torch<script>var a = 1;</script>", "Torch"),
    ],
)
def test_repairs(title, expected):
    cleaned, changed = clean_title(title)
    assert cleaned == expected and changed
    assert clean_title(cleaned) == (expected, [])


@pytest.mark.parametrize(
    "title",
    [
        "Books",
        "Industrial & Scientific",
        '1.88" Tape 3" x 5"',
        "I <3 You & <Insert Name>",
        "a < b > c",
        "Food&notes &copy 2 &unknown; &notit;",
        "!!!",
        "Gamma Function (Dover)",
        "C# {2nd ed.}",
        "var house = home",
        "The function (of) {life}",
        "Function (of) {life}",
        "<video games> & <button up>",
        '"Nan" and "None"',
        "#1 Dad {Funny: Gift}",
        "#dad {funny: gift}",
        "Book.Title {Vol: 1}",
        "Series.one {color: red}",
        "<time travel> & <main course>",
        "<|im_start|> <pad> [SEP] <unk>",
        "Nancy",
        "None of the Above",
        "Na",
        "Undefined",
        "می\u200cخواهم",  # a zero-width non-joiner that Persian needs
        "Don’t — “quote” 日本語",
    ],
)
def test_leaves_alone(title):
    assert clean_title(title) == (title, [])


@pytest.mark.parametrize(
    "title",
    [
        None,
        "",
        " \t\u200b",
        '" />',
        "<br>",
        'Industrial & Scientific" />',
        "Books />",
        "Toys &amp; Games&quot; />",
        "var aPageStart = (new Date()).getTime();",
        "var ue_t0=ue_t0||+new Date();",
        'var url = "x',
        "var x = y.z",
        "P.when('A').execute(function(A) {",
        "function go(a, b) { if (a) { b(); } }",
        ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget",
        ".a{margin:0}",
        "#box .item { -webkit-box-shadow: none; }",
        "<s></s>",
    ],
)
def test_unusable(title):
    assert clean_title(title)[0] is None


@pytest.mark.parametrize(
    "title",
    ["nan", "NaN", "None", "null", "NULL", "N/A", "n/a", "<NA>", "&lt;NA&gt;", "NA", "NaT", "#N/A"]
    + ["n.a.", "N.A.", '"nan"', "'N/A'", '" NULL "', "&quot;nan&quot;"]
    + ["\\N", " nan ", "<b>nan</b>", "undefined", "(null)"],
)
def test_spelled_missing_values_are_no_titles(title):
    assert clean_title(title) == (None, ["missing_values"])


def test_the_report_counts_missing_values_where_there_are_any():
    cleaned, report = clean_titles(["nan", "Fine", None, "N/A"])
    assert report["unusable"]["count"] == 3
    assert report["missing_values"]["count"] == 2
    assert report["missing_values"]["examples"][1] == [3, "N/A", cleaned[3]]
    assert len(set(cleaned)) == 4
    assert "missing_values" not in clean_titles(["Fine", None])[1]
    assert clean_titles(["nan", "Fine"], "drop")[0] == [None, "Fine"]
    assert clean_titles(["nan", "Fine"], "verbatim")[0] == ["nan", "Fine"]


def test_the_tags_are_those_of_html():
    names = {"a", "s", "del", "ins", "strike", "font", "center", "main", "h6", "wbr", "td", "video"}
    assert names <= HTML_NAMES
    assert not {"pad", "unk", "insert", "na", "null"} & HTML_NAMES


def test_placeholders_are_unique_stable_and_hide_the_order():
    titles = ["Fine", None, "", 'Books" />', "Fine", "A &amp; B"] + [None] * 500
    cleaned, report = clean_titles(titles)
    assert cleaned == clean_titles(titles)[0]
    names = [cleaned[i] for i in (1, 2, 3, *range(6, 506))]
    assert len(set(names)) == 503 and all(name.startswith("Untitled item ") for name in names)
    assert sorted(names) != names and cleaned[0] == cleaned[4] == "Fine" and cleaned[5] == "A & B"
    assert report["unusable"]["count"] == 503 and len(report["unusable"]["examples"]) == 5
    assert report["entities"] == {"count": 1, "examples": [[5, "A &amp; B", "A & B"]]}
    assert report["items_sharing_a_title"] == 2 and report["policy"] == "placeholder"
    # An item keeps its name when others come and go, and gives way to a real title.
    alone, _ = clean_titles(["x", None, cleaned[1] + " ", "y"])
    assert alone[2] == cleaned[1] and alone[1] not in (None, cleaned[1])


def test_drop_marks_items_and_policies_are_named():
    cleaned, report = clean_titles(["a", None, "b"], "drop")
    assert cleaned == ["a", None, "b"]
    assert report["unusable"]["count"] == 1
    assert report["items_sharing_a_title"] == 0
    with pytest.raises(UsageError, match="known: placeholder, drop"):
        clean_titles(["a"], "guess")


def test_report_is_json_even_with_broken_unicode():
    _, report = clean_titles(["\ud83d"])
    json.dumps(report, ensure_ascii=False).encode()


# The counts come from the README of the data and from grep: entities 166 and 87, debris 27, double
# spaces 13 and 43 (the other changes of white space are non-breaking spaces).
@pytest.mark.parametrize(
    ("name", "entities", "unusable"),
    [
        ("books-small", 166, ["Books />", None]),
        ("industrial", 87, ['Industrial & Scientific" />'] * 27),
    ],
)
def test_real_titles(shared, name, entities, unusable):
    lines = (shared / "data" / name / "items.jsonl").read_text(encoding="utf-8").splitlines()
    titles = [json.loads(line)["title"] for line in lines]
    cleaned, report = clean_titles(titles)
    assert report["entities"]["count"] == entities
    bad = [title for title in titles if clean_title(title)[0] is None]
    assert sorted(bad, key=str) == sorted(unusable, key=str)
    assert all(clean_title(title) == (title, []) for title in cleaned)
    assert sum("  " in title for title in titles if title) <= report["whitespace"]["count"] < 60
