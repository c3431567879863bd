"""The page of a report is whole HTML, says every verdict, and needs nothing but itself."""

import base64
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from landscape_fast.studies._criteria import criterion
from landscape_fast.studies._page import PageFigure, PageTable, Section, write_page

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "hr", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects links, images, ids and the text of each tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.images, self.ids, self.text = [], [], [], [], []
        self.tags = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "img":
            self.images.append(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.text.append((self.open[-1], " ".join(data.split())))


def claims():
    found = [("F2", [0.017]), ("F3", [0.9]), ("F4", [None]), ("F5", [0.1, 0.01, 0.02])]
    rows = [criterion(s, "at most 0.05", "{:.3f}", v, lambda x: x <= 0.05) for s, v in found]
    rows[0]["claim"] = "runs are <orthogonal> & far apart"
    rows[2]["reason"] = "one run only"
    return rows


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "report"
    (folder / "figures").mkdir(parents=True)
    files = [folder / "figures" / f"a map{suffix}" for suffix in (".png", ".pdf", ".csv")]
    for file in files:
        file.write_bytes(PNG)
    sections = [
        Section("Weights & <labels>", ["First.", "5 < 6"], claims()[:3],
                [PageFigure(files[0], 'what "it" shows', 'a "map"', files[1:])]),
        Section("Ensembles", claims=claims()[3:], tables=[
            PageTable([{"m": "<b>", "a": 0.5, "b": None}, {"m": "x", "a": 0.25}],
                      [("m", "method", "{}"), ("a", "accuracy", "{:.1%}"), ("b", "ECE", "{:.2f}")],
                      "of five"),
            PageTable([{"k": 1}]),
        ]),
        Section("Settings", settings={"data": {"name": "digits"}, "sizes": [1, 2], "lr": 0.1}),
    ]  # fmt: skip
    path = write_page(folder / "page.html", "Runs & more", sections)
    return path, path.read_text(encoding="utf-8"), sections


def test_tags_are_balanced_and_links_lead_somewhere(made):
    path, text, _ = made
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and ("title", "Runs & more") in page.text
    assert len(set(page.ids)) == len(page.ids) == 3
    inside = [link[1:] for link in page.links if link.startswith("#")]
    files = [link for link in page.links if not link.startswith("#")]
    assert set(inside) == set(page.ids)
    names = ["png", "png", "pdf", "csv"]  # the image itself is a link, too
    assert files == [f"figures/a%20map.{name}" for name in names]
    assert all((path.parent / unquote(link)).is_file() for link in files)


def test_nothing_comes_from_elsewhere(made):
    _, text, _ = made
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|\son[a-z]+=", text)
    assert [image["src"] for image in page.images] == [
        "data:image/png;base64," + base64.b64encode(PNG).decode()
    ]
    assert page.images[0]["alt"] == 'a "map"' and not {"script", "link", "iframe"} & set(page.tags)
    assert '<meta name="viewport" content="width=device-width' in text
    assert "@media print" in text and "@media (max-width" in text


def test_verdicts_are_counted_and_told_by_word_and_symbol(made):
    _, text, _ = made
    summary = text.split('class="summary"')[1].split("</section>")[0]
    counts = re.findall(r'<li class="(\w+)"><b>(\d)</b>.*?>(.)</span> (\w+)<', summary)
    assert counts == [
        ("pass", "1", "✓", "pass"), ("fail", "1", "✗", "fail"),
        ("inconclusive", "2", "?", "inconclusive"),
    ]  # fmt: skip
    assert "4 claims, compared" in summary and "1 pass, 1 fail, 1 inconclusive" in summary
    assert text.index('class="summary"') < text.index("<h2>")


def test_every_claim_shows_source_number_criterion_and_verdict(made):
    _, text, _ = made
    rows = re.findall(r'<tr class="(\w+)">(.*?)</tr>', text)
    assert [verdict for verdict, _ in rows] == ["pass", "fail", "inconclusive", "inconclusive"]
    cells = [dict(re.findall(r'<td data-label="(\w+)">(.*?)</td>', row)) for _, row in rows]
    assert [cell["source"] for cell in cells] == ["F2", "F3", "F4", "F5"]
    assert [cell["found"] for cell in cells] == ["0.017", "0.900", "-", "0.100 0.010 0.020"]
    assert {cell["criterion"] for cell in cells} == {"at most 0.05"}
    assert cells[0]["claim"] == "runs are &lt;orthogonal&gt; &amp; far apart"
    assert cells[1]["claim"] == "-" and "claim" not in cells[3]  # no column that is all empty
    assert "<small>one run only</small>" in cells[2]["verdict"]
    assert cells[3]["verdict"].endswith("(2 of 3)") and "of" not in cells[0]["verdict"]


def test_text_tables_and_settings_are_escaped_and_complete(made):
    _, text, _ = made
    page = Page(text)
    said = {tag: [t for other, t in page.text if other == tag] for tag in page.tags}
    assert said["h2"] == ["Weights & <labels>", "Ensembles", "Settings"]
    assert {"First.", "5 < 6"} <= set(said["p"]) and 'what "it" shows' in said["figcaption"]
    cells = ["<b>", "50.0%", "-", "x", "25.0%", "-", "1"]
    assert said["td"][-7:] == cells and "of five" in said["caption"]
    assert said["th"][-4:] == ["method", "accuracy", "ECE", "k"]
    assert said["dt"] == ["data.name", "sizes", "lr"] and said["dd"] == ["digits", "1, 2", "0.1"]


def test_a_page_is_written_whole_and_the_same_again(made, monkeypatch):
    path, text, sections = made
    assert write_page(path, "Runs & more", sections).read_text(encoding="utf-8") == text
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == ["page.html"]
    plain = write_page(path.parent / "plain.html", "Empty", [Section("Nothing")]).read_text()
    assert Page(plain).links == [] and "summary" not in plain.split("</style>")[1]


def test_what_does_not_fit(tmp_path):
    there = tmp_path / "a.png"
    there.write_bytes(PNG)
    (tmp_path / "a.pdf").write_bytes(PNG)
    wrong = {
        r"sections must be of different headings; got \['a', 'a'\]": [Section("a"), Section("a")],
        "verdict must be one of .*; got 'maybe'": [Section("a", claims=[{"verdict": "maybe"}])],
        "figure must be a PNG or SVG file; got .*a.pdf": [
            Section("a", figures=[PageFigure(tmp_path / "a.pdf", "c")])
        ],
        "figure must be of files that exist; got .*b.csv": [
            Section("a", figures=[PageFigure(there, "c", files=[tmp_path / "b.csv"])])
        ],
    }
    for match, sections in wrong.items():
        with pytest.raises(ValueError, match=f"write_page: {match}"):
            write_page(tmp_path / "page.html", "t", sections)
    assert not (tmp_path / "page.html").exists()
