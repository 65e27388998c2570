"A report is one whole, safe, small file; figures come out of it as they went in."

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from aoi_ssl import report, show
from aoi_ssl.core import AoiError
from aoi_ssl.report import Plot, Section, Table, write_report

EVIL = '<script>alert("x")</script>&'


class Page(HTMLParser):
    "Checks that tags close in order, and keeps tags and text."

    EMPTY = {"meta", "link", "img", "source", "br"}

    def __init__(self, path):
        super().__init__()
        self.stack, self.tags, self.text = [], [], []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [a for t, a in self.tags if t == tag]

    def pictures(self):
        return [pixels(a["src"]) for a in self.all("img")], [pixels(a["srcset"]) for a in self.all("source")]


def pixels(address):
    assert address.startswith("data:image/webp;base64,")
    return Image.open(BytesIO(base64.b64decode(address.split(",")[1])))


@pytest.fixture
def photo():
    rng = np.random.default_rng(0)
    return show.overlay(rng.random((1, 40, 60), dtype=np.float32), rng.random((2, 40, 60)) > 0.9, ["a", "b"], width=3)


@pytest.fixture
def chart():
    return show.curves(pd.DataFrame({"step": range(5), "loss": [5.0, 4, 3, 2, 1]}), width=4)


def write(path, *items, **options):
    options = {"title": "T", "summary": "S", "sections": [Section("One", "", list(items))], **options}
    return Page(write_report(path / "report.html", **options))


def test_page_is_self_contained_and_well_formed(tmp_path, photo, chart):
    others = [pd.DataFrame({"x": [1]}), "words", ["one", "two"]]
    sections = [Section("A", "Text.", [photo, chart]), Section("B", "", others)]
    page = write(tmp_path, sections=sections, summary=["found this", "and that"], facts={"mIoU": 0.5})
    for tag, attributes in page.tags:
        assert tag != "script" and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "url(" not in page.source and "@import" not in page.source
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and "default-src 'none'" in policy[0]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert page.all("html")[0]["lang"] == "en" and any(a.get("name") == "viewport" for a in page.all("meta"))
    assert [a["href"] for a in page.all("a")][1:] == ["#s1", "#s2"]
    for image in page.all("img"):
        assert len(image["alt"]) > 20 and int(image["width"]) > 100 and int(image["height"]) > 100


def test_everything_from_outside_is_escaped(tmp_path, photo):
    frame = pd.DataFrame({EVIL: [EVIL]}, index=pd.Index([EVIL], name=EVIL))
    items = [Table(frame, EVIL), Plot(photo, EVIL, EVIL), EVIL, [EVIL]]
    page = write(tmp_path, title=EVIL, summary=EVIL, facts={EVIL: EVIL}, sections=[Section(EVIL, EVIL, items)])
    assert "<script" not in page.source and page.all("img")[0]["alt"] == EVIL
    assert page.text.count(EVIL) >= 12


def test_old_report_survives_every_failure(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(AoiError, match="holds a int"):
        write(tmp_path, 42)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, "text")
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_same_items_same_bytes_and_nothing_changes(tmp_path, photo, chart):
    chart.draw_without_rendering()  # makes the ticks
    before = matplotlib.rcParams.copy()
    colours = [(to_hex(getattr(a, f"get_{n}")()), n) for f in (photo, chart) for a, n in report._furniture(f)]
    first, second = (write(tmp_path, photo, chart).source for _ in range(2))
    assert first == second and matplotlib.rcParams == before and plt.get_fignums() == []
    assert colours == [(to_hex(getattr(a, f"get_{n}")()), n) for f in (photo, chart) for a, n in report._furniture(f)]


def test_night_picture_has_dark_paper_light_ink_and_the_same_data(tmp_path, photo, chart):
    (photo_day, chart_day), (photo_night, chart_night) = write(tmp_path, photo, chart).pictures()
    assert chart_day.getpixel((2, 2))[:3] == (255, 255, 255) and chart_night.getpixel((2, 2))[:3] == (0x16, 0x1B, 0x22)
    day, night = (np.asarray(c.convert("RGB")).reshape(-1, 3).tolist() for c in (chart_day, chart_night))
    line = [0x00, 0x72, 0xB2]
    assert day.count(line) == pytest.approx(night.count(line), rel=0.01) and day.count(line) > 100
    assert [0xE6, 0xED, 0xF3] in night and [0x1F, 0x23, 0x28] in day and [0x1F, 0x23, 0x28] not in night
    for picture in (photo_day, photo_night):  # paper is transparent, so that it is the page's own
        assert picture.mode == "RGBA" and picture.getpixel((2, 2))[3] == 0
    middle = [np.asarray(p.convert("RGB"), int)[100:300, 200:400] for p in (photo_day, photo_night)]
    assert np.abs(middle[0] - middle[1]).mean() < 3


def test_night_restores_the_figure_after_a_failure(chart):
    with pytest.raises(RuntimeError), report._night(chart):
        raise RuntimeError
    assert to_hex(chart.get_facecolor()) == "#ffffff"


def test_pictures_have_two_pixels_for_one_while_they_fit(tmp_path, photo):
    large = write(tmp_path, photo)
    assert large.pictures()[0][0].width == 2 * int(large.all("img")[0]["width"]) == 600
    small = write(tmp_path, photo, limit=len(large.source) - 1)
    assert small.pictures()[0][0].width == 300 and small.all("img")[0]["width"] == "300"
    with pytest.warns(UserWarning, match="more than"):
        least = write(tmp_path, photo, limit=100)
    assert len(least.source) < len(small.source) < len(large.source)


def test_plain_matplotlib_figures_are_taken_and_described(tmp_path):
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([1, 2])
    axes.set_title("IoU over labels")
    page = write(tmp_path, figure, Plot(figure, "A caption"))
    assert [a["alt"] for a in page.all("img")] == ["IoU over labels", "A caption"]
    assert "A caption" in page.text


def rows(table):
    lines = re.findall(r"<tr>(.*?)</tr>", report._table(table), re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines]


def test_numbers_are_formatted_by_column():
    frame = pd.DataFrame({
        "iou": [0.5, np.nan], "tp": [0, 1234567], "s": [12.34, -150.0], "ok": [True, False],
        "value": [0, "<3"], "count": pd.array([1, None], dtype="Int64"), "whole": [1.0, 30.0],
    })
    head, first, second = rows(Table(frame))
    assert head == list(frame)
    assert first == ["0.500", "0", "12.3", "yes", "0", "1", "1"]
    assert second == ["–", "1,234,567", "−150.0", "no", "&lt;3", "–", "30"]


def test_best_is_bold_for_fractions_ties_included():
    frame = pd.DataFrame({"method": list("abc"), "iou": [0.70001, 0.70004, 0.1], "tp": [1, 2, 3], "no": [np.nan] * 3})
    bold = [[c.startswith("<strong>") for c in r] for r in rows(Table(frame, best="max"))[1:]]
    assert bold == [[False, True, False, False], [False, True, False, False], [False] * 4]
    bold = [[c.startswith("<strong>") for c in r] for r in rows(Table(frame, best={"tp": "min"}))[1:]]
    assert [r[2] for r in bold] == [True, False, False] and sum(map(sum, bold)) == 1
    assert not any("<strong>" in c for r in rows(Table(frame)) for c in r)


def test_index_is_shown_when_it_says_something():
    frame = pd.DataFrame({"x": [1, 2]})
    for plain in (frame, frame.iloc[::-1], pd.concat([frame, frame])):
        assert rows(Table(plain))[0] == ["x"]
    assert rows(Table(frame.rename_axis("step")))[0] == ["step", "x"]
    assert rows(Table(frame.set_axis(["a", "b"])))[1] == ["a", "1"]
    both = frame.set_axis(pd.MultiIndex.from_tuples([("d1", "wire"), ("d2", "ball")]))
    both.columns = pd.MultiIndex.from_tuples([("bank", "iou")])
    assert rows(Table(both))[0][2] == "bank / iou" and rows(Table(both))[1] == ["d1", "wire", "1"]
    assert rows(Table(frame.rename_axis("x")))[0] == ["x", "x"]
    assert len(rows(Table(frame.iloc[:0]))) == 1


def test_tables_can_be_read_aloud(tmp_path):
    page = write(tmp_path, Table(pd.DataFrame({"method": ["bank"], "iou": [0.5]}), "Scores"))
    assert [a["scope"] for a in page.all("th")] == ["col", "col", "row"] and page.all("caption")
    assert page.all("td")[0]["class"] == "n" and any(a.get("aria-label") == "Scores" for a in page.all("div"))


def test_one_item_needs_no_list(tmp_path, chart):
    assert len(write(tmp_path, sections=[Section("A", "", chart)]).all("img")) == 1
    assert len(write(tmp_path, sections=[Section("A", "", pd.DataFrame({"x": [1]}))]).all("table")) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sections": [("A", "text")]}, "Section(title, text, items)"),
        ({"sections": [Section("A", "", [Table(pd.DataFrame({"x": [1.0]}), best={"y": "max"})])]}, "['x']"),
        ({"sections": [Section("A", "", [Table(pd.DataFrame({"x": [1.0]}), best="most")])]}, '"max" or "min"'),
    ],
)
def test_wrong_arguments_are_refused_in_words(tmp_path, options, words):
    with pytest.raises(AoiError) as error:
        write(tmp_path, **options)
    assert words in str(error.value) and not list(tmp_path.iterdir())


def test_a_folder_is_no_report(tmp_path):
    with pytest.raises(AoiError, match="is a folder"):
        write_report(tmp_path, title="T", summary="S", sections=[])
