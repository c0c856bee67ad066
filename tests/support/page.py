"""A page of HTML as its parts."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The text of every element, by tag, and what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.pictures, self.references, self.ids, self.labels = [], {}, [], [], [], []
        self.source = text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.labels += [attributes["aria-label"]] if tag == "svg" and "aria-label" in attributes else []
        self.pictures += [attributes] if tag == "img" else []
        if tag not in ("img", "meta", "link"):
            self.text.setdefault(tag, []).append("")
            self.open.append((tag, len(self.text[tag]) - 1))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, index in self.open:
            self.text[tag][index] += data
