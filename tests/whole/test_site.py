"""The site: built once from this checkout, its files checked, and read in a browser from the disk.

It needs the packages of the extra `site`. To look at it: make site, and open build/site/index.html.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from minivllm.course.authoring.tool import ROOT
from minivllm.course.notebooks import ROAD, chapters
from support.answers import shown_answers
from support.browser import Page

# A busy machine needs minutes for the one build.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

#: Seconds of processor time: less than three minutes on two cores.
MOST_SECONDS = 180
MOST_BYTES = 30e6
EXERCISES = [chapter.name for chapter in chapters(ROOT)]
#: Pages that are opened on a narrow screen.
NARROW = [
    "index",
    *(f"notebooks/{stop.name}" for stop in ROAD),
    "exercises/05_scheduler",
    "notebooks/cheat_sheet",
    "notebooks/glossary",
    "guide/library",
    "guide/command_line",
    "guide/measured",
    "guide/architecture",
    "reference/index",
    "reference/minivllm.llm",
    "reference/minivllm.kernels",
    "reference/minivllm.engine.scheduler",
]


class Reader(HTMLParser):
    """What a check needs of a page: its anchors, its links, and its blocks of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        #: (tag, target)
        self.links: list[tuple[str, str]] = []
        self.blocks: list[str] = []
        self._in_block = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [(tag, given[name]) for name in ("href", "src", "action") if name in given]
        if tag == "pre":
            self._in_block = True
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_block = self._in_block and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_block:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[site]'")
    out = tmp_path_factory.mktemp("site") / "pages"
    before = os.times()
    built = subprocess.run(
        [sys.executable, str(ROOT / "site/build.py"), "--committed", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=1000,
    )
    assert built.returncode == 0, built.stdout[-3000:]
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])  # of child processes: user and system
    assert seconds < MOST_SECONDS, f"{seconds:.0f} s of processor time"
    return out


@cache
def read(path: Path) -> Reader:
    return Reader(path)


def pages(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def test_all_pages_are_there_and_the_site_is_small(site: Path) -> None:
    expected = {f"notebooks/{stop.name}" for stop in ROAD} | {f"exercises/{n}" for n in EXERCISES}
    expected |= {"index", "search", "notebooks/glossary", "notebooks/cheat_sheet"}
    expected |= {"guide/library", "guide/command_line", "guide/installing", "guide/architecture"}
    expected |= {
        f"reference/minivllm.{n}" for n in ("llm", "errors", "engine.scheduler", "kernels")
    }
    found = {path.relative_to(site).with_suffix("").as_posix() for path in pages(site)}
    assert expected - found == set()
    assert not [name for name in found if "solution" in name]
    assert len(found) > 130
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < MOST_BYTES


def broken(site: Path, page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere, and those that are not relative."""
    for tag, target in read(page).links:
        parts = urlsplit(target)
        shown = f"{page.relative_to(site)}: {tag} {target[:80]}"
        if parts.scheme in ("http", "https", "mailto") and tag == "a":
            continue
        if parts.scheme == "data" and tag in ("iframe", "img"):
            continue
        if parts.scheme or parts.netloc or parts.path.startswith("/"):
            yield f"{shown} (not relative)"
            continue
        to = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not to.is_file() or not to.is_relative_to(site.resolve()):
            yield f"{shown} (no such file)"
        elif (
            tag == "a"
            and parts.fragment
            and "_static" not in to.parts
            and unquote(parts.fragment) not in read(to).anchors
        ):
            yield f"{shown} (no such anchor)"


def test_every_link_leads_somewhere(site: Path) -> None:
    site = site.resolve()
    assert [link for page in pages(site) for link in broken(site, page)] == []
    assert sum(len(read(page).links) for page in pages(site)) > 10_000


def test_nothing_names_this_machine(site: Path) -> None:
    names = [str(ROOT), str(site.parent), "site-packages", "file://"]
    home = str(Path.home())
    names += [f"{home}/"] if len(home) > 1 else []
    text_files = [p for p in site.rglob("*") if p.suffix in (".html", ".js", ".css", ".inv")]
    ours = [path for path in text_files if "_static" not in path.parts or path.name == "run.html"]
    found = [
        (path.relative_to(site).as_posix(), name)
        for path in ours
        for name in names
        if name in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []


def test_no_answer_is_shown(site: Path) -> None:
    """On no page but the chapters, which teach the finished code."""
    blocks = {
        f"{page.relative_to(site)}, block {number}": block
        for page in pages(site)
        if page.parent.name != "notebooks"
        for number, block in enumerate(read(page).blocks)
    }
    assert [hit for chapter in chapters(ROOT) for hit in shown_answers(chapter, blocks)] == []
    for name in EXERCISES:
        text = (site / f"exercises/{name}.html").read_text(encoding="utf-8")
        assert "your code here" in text
        assert "cell_output" not in text, "an exercise has no outputs"
        assert text.count("<summary>Hint") > 5


def test_the_search_index_knows_where_preemption_is_taught(site: Path) -> None:
    import snowballstemmer

    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)\s*", text, re.DOTALL)[1])
    stem = snowballstemmer.stemmer("english").stemWord("preemption")
    at = index["terms"].get(stem, [])
    found = {index["docnames"][number] for number in ([at] if isinstance(at, int) else at)}
    assert "notebooks/05_scheduler" in found


def test_the_sidebar_is_the_road(site: Path) -> None:
    """Each chapter, followed by its exercises."""
    expected = []
    for stop in ROAD:
        expected.append(f"notebooks/{stop.name}.html")
        expected += [f"exercises/{stop.name}.html"] * (stop.name in EXERCISES)
    found = [to for tag, to in read(site / "index.html").links if tag == "a" and to in expected]
    assert found[: len(expected)] == expected


def test_plumbing_is_folded_and_pictures_are_described(site: Path) -> None:
    """As in JupyterLab: see the metadata of chapter 06."""
    for stop in ROAD:
        notebook = json.loads((ROOT / f"notebooks/{stop.name}.ipynb").read_text(encoding="utf-8"))
        metadata = [cell["metadata"].get("jupyter", {}) for cell in notebook["cells"]]
        text = (site / f"notebooks/{stop.name}.html").read_text(encoding="utf-8")
        hidden = sum("source_hidden" in each for each in metadata)
        assert text.count("tag_hide-input") == hidden, stop.name
        pictures = re.findall(r"<img[^>]*_images/[^>]*>", text)
        assert pictures
        assert [picture for picture in pictures if not re.search(r'alt="[^"]{20,}', picture)] == []


# --- in a browser, from the disk ------------------------------------------------------------------


def go(page: Page, site: Path, name: str, then: str = "true") -> None:
    page.send("Page.navigate", url=(site / f"{name}.html").as_uri())
    end = json.dumps(f"/{name}.html")
    page.wait_for(
        f"location.pathname.endsWith({end}) && document.readyState === 'complete' && !!({then})", 60
    )


def test_search_without_a_server(page: Page, site: Path) -> None:
    go(page, site, "index")
    # The address to which the form leads. A click would race with the questions to the page.
    address = page.evaluate(
        "(() => { const form = document.querySelector('form.bd-search');"
        " return `${form.action}?${form.querySelector('input').name}=preemption`; })()"
    )
    page.send("Page.navigate", url=address)
    found = page.wait_for(
        "/found/.test(document.querySelector('.search-summary').textContent)"
        " && [...document.querySelectorAll('ul.search a')].map((a) => a.getAttribute('href'))",
        60,
    )
    assert any("notebooks/05_scheduler.html" in link for link in found), found


PLAYER = "document.querySelector('iframe.player').contentWindow.player"


def test_the_front_page_plays_a_run(page: Page, site: Path) -> None:
    go(page, site, "index", f"{PLAYER}.run.states.length > 50")
    assert page.evaluate(f"{PLAYER}.at") == 0
    inside = "document.querySelector('iframe.player').contentDocument"
    buttons = f"[...{inside}.querySelectorAll('.mv-bar button')]"
    page.evaluate(f"{buttons}.find((b) => b.textContent === '▶').click()")
    assert page.evaluate(f"{PLAYER}.at") == 1
    page.evaluate(f"{buttons}.find((b) => b.textContent === 'Play').click()")
    page.wait_for(f"{PLAYER}.at > 3", 30)
    # The run has all that it is shown for.
    kinds = page.evaluate(f"[...new Set({PLAYER}.run.events.map((event) => event.kind))]")
    assert "preemption" in kinds, kinds


def test_both_themes(page: Page, site: Path) -> None:
    """The page, the player and the pictures."""
    go(page, site, "index", f"{PLAYER}.root")
    seen = {}
    for theme in ("dark", "light", "dark"):
        page.evaluate(f"document.querySelector('.theme-change-button[data-mode={theme}]').click()")
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        seen[theme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = str(theme == "dark").lower()
        page.wait_for(f"{PLAYER}.root.classList.contains('dark') === {dark}", 20)
    assert seen["light"] == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", seen["dark"])[:3])) < 100
    go(page, site, "notebooks/05_scheduler")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark", "it is remembered"
    pictures = page.evaluate(
        "[...document.querySelectorAll('.cell_output img')].map((img) => ({...["
        "'backgroundColor', 'filter'].map((name) => getComputedStyle(img)[name])}))"
    )
    assert len(pictures) > 5
    assert {tuple(picture.values()) for picture in pictures} == {("rgba(0, 0, 0, 0)", "none")}


def test_previous_and_next(page: Page, site: Path) -> None:
    go(page, site, "notebooks/05_scheduler")
    for link, end in (
        ("right-next", "exercises/05_scheduler"),
        ("right-next", "notebooks/06_qwen3"),
        ("left-prev", "exercises/05_scheduler"),
        ("left-prev", "notebooks/05_scheduler"),
        ("left-prev", "exercises/04_block_manager"),
    ):
        to = page.wait_for(f"document.querySelector('a.{link}').href", 30)
        page.send("Page.navigate", url=to)
        page.wait_for(f"location.pathname.endsWith('/{end}.html')", 30)


def test_a_hint_and_a_folded_cell_open(page: Page, site: Path) -> None:
    go(page, site, "exercises/05_scheduler")
    hint = "[...document.querySelectorAll('details')].find((d) => d.innerText.includes('Hint 1'))"
    assert not page.evaluate(f"{hint}.open")
    page.evaluate(f"{hint}.querySelector('summary').click()")
    assert page.evaluate(f"{hint}.open")
    go(page, site, "notebooks/06_qwen3")
    cell = "document.querySelector('.tag_hide-input')"
    height = f"{cell}.querySelector('.highlight').getBoundingClientRect().height"
    assert not page.evaluate(f"{cell}.querySelector('details').open")
    page.evaluate(f"{cell}.querySelector('summary').click()")
    assert page.evaluate(height) > 20


def test_a_narrow_screen_does_not_scroll_sideways(page: Page, site: Path) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.send("Emulation.setDeviceMetricsOverride", **size)
    wide = {}
    for name in NARROW:
        go(page, site, name)
        if page.evaluate("document.documentElement.scrollWidth") > 400:
            wide[name] = page.evaluate(
                "[...document.querySelectorAll('.bd-content *')].filter((e) =>"
                " e.getBoundingClientRect().right > 401).slice(0, 3)"
                ".map((e) => e.outerHTML.slice(0, 100))"
            )
    assert wide == {}
