"""Reading a page that was written."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page loads, links into itself, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        self.loads += [value for value in found if not value.startswith("#")]
        self.links += [value for value in found if value.startswith("#")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())
