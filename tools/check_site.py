"""Check that the built documentation loads nothing from the network.

    python tools/check_site.py build/site

A page may link to other sites. Scripts, style sheets, images, fonts and frames must be files of the
site, so that the pages can be read without a network. Mermaid diagrams are refused, because the
theme loads their library from elsewhere.
"""

import argparse
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Element → attribute with the address that a browser loads."""

NOT_LOADED = {"canonical", "next", "prev", "alternate", "license", "author"}
"""Values of `rel` for which a <link> names a page and loads nothing."""

IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^"')\s]*""")


class Addresses(HTMLParser):
    """The addresses that a page loads when it is opened, in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the address of an element that loads one."""
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and set(values.get("rel", "").split()) <= NOT_LOADED:
            return
        if tag in LOADED and LOADED[tag] in values:
            self.found.append(values[LOADED[tag]])


def loaded_from_elsewhere(path: Path) -> Iterator[str]:
    """Yield the addresses of other servers that an HTML or CSS file loads."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        addresses = Addresses()
        addresses.feed(text)
        yield from (a for a in addresses.found if a.startswith(("http:", "https:", "//")))
        yield from re.findall(r'class="mermaid"', text)
    yield from IN_CSS.findall(text)


def main() -> None:
    """Exit with a list of addresses if a page loads anything from another server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("site", type=Path, help="folder that mkdocs has built")
    site = parser.parse_args().site

    pages = sorted(site.rglob("*.html"))
    if not pages:
        raise SystemExit(f"{site} has no pages: run `make docs`")
    found = [
        f"{path.relative_to(site)}: {address}"
        for path in [*pages, *sorted(site.rglob("*.css"))]
        for address in loaded_from_elsewhere(path)
    ]
    if found:
        raise SystemExit("loaded from the network:\n" + "\n".join(found))
    print(f"{site}/index.html: {len(pages)} pages, nothing loaded from the network")


if __name__ == "__main__":
    main()
