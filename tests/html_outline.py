"""The outline of an HTML page."""

from html.parser import HTMLParser


class Outline(HTMLParser):
    """Elements of a page, with a check that every one is closed where it has to be."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))

    def of(self, tag: str, css: str | None = None) -> list[dict]:
        return [a for name, a in self.elements if name == tag and (css is None or css in a.get("class", "").split())]
