"""The documentation's site: built without network and without a warning; every link leads somewhere."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers import ROOT

pytest.importorskip("material", reason="mkdocs-material is not here: the extra [dev]")

NOWHERE = "http://127.0.0.1:9"
"""A proxy that nobody answers."""


class Page(HTMLParser):
    """What a page links to, what it fetches by itself, and where links may point into it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and found.get("rel") != "canonical":
            self.fetched.append(found["href"])
        if "src" in found:
            self.fetched.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "http_proxy": NOWHERE, "https_proxy": NOWHERE}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr and "ERROR" not in built.stderr
    return {path: Page(path.read_text()) for path in sorted(folder.glob("**/*.html"))}


def test_every_page_is_there(site):
    names = {path.name for path in site}
    ours = {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")}
    assert ours - {"README.html"} <= names
    assert {"index.html", "readme.html", "slurm.html", "contributing.html", "api.html"} <= names


def test_every_link_leads_to_a_page_and_a_heading(site):
    dead = []
    for path, page in site.items():
        if path.name == "404.html":  # its links are relative to the site's own address
            continue
        for link in [*page.links, *page.fetched]:
            address = urlsplit(link)
            if address.scheme or not (address.path or address.fragment):
                continue
            target = path if not address.path else (path.parent / unquote(address.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(address.fragment)
            known = not anchor or target not in site or anchor in site[target].anchors
            if not target.is_file() or not known:
                dead.append(f"{path.name}: {link}")
    assert sum(len(page.links) for page in site.values()) > 500
    assert dead == []


def test_a_reader_asks_nobody_else(site):
    outside = {link for page in site.values() for link in page.fetched if urlsplit(link).netloc}
    assert outside == set()
    styles = [p.read_text() for path in site for p in path.parent.glob("assets/stylesheets/*.css")]
    assert styles and not any("fonts.googleapis" in style for style in styles)


def test_the_reference_is_made_from_the_source(site):
    (api,) = (page for path, page in site.items() if path.name == "api.html")
    assert "adapters.methods.base.Method" in api.anchors
    assert "adapters.methods.base.Method.decide" in api.anchors
    assert "trainer.engine.base.Engine" in api.anchors
