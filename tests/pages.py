"""What a test reads from a page, and the browser that opens it, where there is one."""

import base64
import io
import json
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HTMLParser):
    """The elements of a page with their attributes, its visible text, and its plots."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.words, self.plots, self.inside = [], [], {}, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.words.append(data)
        elif self.inside[-1][1].get("type") == "application/json":
            self.plots[self.inside[-1][1]["id"]] = json.loads(data)

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def images(self):
        """Every picture, decoded."""
        found = []
        for image in self.all("img"):
            kind, _, data = image["src"].partition(";base64,")
            assert kind in ("data:image/png", "data:image/jpeg") and image["alt"].strip()
            found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB"))
        return found

    def check(self):
        """What holds of every page: nothing from outside, headings in order, labels that are there."""
        for tag, attributes in self.elements:
            for name in ("src", "href", "srcset", "data", "poster", "action"):
                assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes[name][:80])
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert not self.all("link") and not self.all("iframe")
        style = self.source[self.source.index("<style>") : self.source.index("</style>")]
        assert "url(" not in style and "@import" not in style
        assert self.all("html")[0]["lang"] == "en"
        headings = [int(tag[1]) for tag, _ in self.elements if tag in ("h1", "h2", "h3", "h4")]
        assert headings[0] == 1 and headings.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(headings))
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {a["aria-labelledby"] for _, a in self.elements if "aria-labelledby" in a} <= set(ids)
        assert all("aria-labelledby" in table for table in self.all("table"))
        assert {a["data-figure"] for a in self.all("div", **{"class": "plot"})} == set(self.plots)
        assert all(figure["data"] for figure in self.plots.values())
        assert self.images() or not self.all("img")


@contextmanager
def browser():
    """A headless Chromium, as a function that opens a page and says what it logs; skips where there is none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
        if not Path(found).is_file():
            pytest.skip(f"no Chromium here ({', '.join(BROWSERS)}, or playwright install chromium)")
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox

        def opened(path, width, scheme):
            page, logged = chromium.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme), []
            page.on("console", lambda message: logged.append(message.text))
            page.on("pageerror", lambda error: logged.append(str(error)))
            page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or logged.append(r.url))
            page.goto(path.resolve().as_uri())
            return page, logged

        try:
            yield opened
        finally:
            chromium.close()


def check_in_a_browser(opened, path):
    """At phone and desktop widths, in dark and light: all plots are drawn, nothing sticks out, nothing is logged.

    Returns the page at desktop width.
    """
    for width, scheme in ((390, "dark"), (1280, "light")):
        page, logged = opened(path, width, scheme)
        drawn = """() => [...document.querySelectorAll(".plot")].every(
            plot => plot.querySelector(".main-svg") && plot.querySelector(".points path, .js-line"))"""
        page.wait_for_function(drawn, timeout=20_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert logged == []
    return page
