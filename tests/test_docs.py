"The docs site: every picture has words, what a cell printed is one text, tables of sentences are read like a text."

import base64
import io
import json
import re

import pytest
from from_tools import load_tool
from test_house import NOTEBOOKS, ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "settings.ini").exists(), reason="needs the source tree")

GENERIC = re.compile(r"\b(figure|picture|plot|image|chart) (of|by|from|made by) (this|the) (cell|code)", re.I)
DOT = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\2\0\1H\xaf\xa4q\0\0\0\0IEND\xaeB`\x82"
).decode()


def cell(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "source": source, "outputs": list(outputs)}


def picture(text: str) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {"image/png": DOT, "text/plain": text}}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def saved(path, *cells: dict):
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def faults(cells: list[dict]) -> list[str]:
    "Pictures of a notebook without words, with words that fit any picture, or with the words of another one."
    found, seen = [], set()
    for c in (c for c in cells if c["cell_type"] == "code"):
        for words in load_tool("build_docs").picture_words(c):
            where = f"{words!r} under {''.join(c['source'])[-60:]!r}"
            if len(words.split()) < 5 or GENERIC.search(words):
                found.append(f"no description: {where}. Give the cell a `#| fig-alt:` line (CONTRIBUTING.md)")
            if words and words in seen:
                found.append(f"twice on this page: {where}")
            seen.add(words)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_picture_is_described(path):
    assert not (found := faults(json.loads(path.read_text(encoding="utf-8"))["cells"])), "\n".join(found)


@pytest.mark.parametrize(
    ("cells", "count"),
    [
        ([cell("plot()", picture("<Figure size 600x300 with 1 Axes>"))], 1),
        ([cell('#| fig-alt: "Figure of this cell, no more than that"\nplot()', picture("<Figure>"))], 1),
        ([cell('#| fig-alt: "A chart"\nplot()', picture("<Figure>"))], 1),
        ([cell('#| fig-alt: "Loss over steps, falling to 0.4"\nplot()', picture("<Figure>"))] * 2, 1),
        ([cell('#| fig-alt: "Loss over steps, falling to 0.4"\nplot()', picture("<Figure>"))], 0),
        ([cell("handle", picture("Masks of wire and ball: image, bank, truth."))], 0),
        ([cell("print(1)", printed("1"))], 0),
    ],
)
def test_a_picture_without_words_is_found(cells, count):
    assert len(faults(cells)) == count


def test_the_line_of_the_cell_wins_over_what_the_output_says():
    words = load_tool("build_docs").picture_words
    given = '#| slow\n#| fig-alt: "IoU: 0.5, \\"wide\\" # and more"\nplot()'
    assert words(cell(given, picture("<Figure>"))) == ['IoU: 0.5, "wide" # and more'] == words(cell(given, picture("Said by itself.")))
    assert words(cell("plot()", picture("Said by itself."), printed("1"))) == ["Said by itself."]


def test_words_reach_the_page(tmp_path):
    "The cell's line, and what a widget says of itself, quotes and all, become the `alt` of the picture in the page."
    from smalldocs.notebook import to_markdown

    given = cell('#| fig-alt: "A curve: it <falls>"\nplot()', picture("<Figure>"))
    path = saved(tmp_path / "a.ipynb", given, cell("handle", picture('Held: "row 3", <wire>.')), cell("plot()", picture("<Figure>")))
    docs = load_tool("build_docs")
    docs.write_picture_words(path)
    page = docs.offline(to_markdown(path.read_text())[1])
    assert re.findall(r'<img alt="([^"]*)" src=', page) == ["A curve: it &lt;falls&gt;", "Held: &quot;row 3&quot;, &lt;wire&gt;."]
    assert page.count("<img ") == page.count('loading="lazy"') == 3


def test_the_built_site_is_searched_for_pictures_without_words(tmp_path):
    check_site = load_tool("check_links").check_site
    (tmp_path / "a.html").write_text('<img src="data:," alt="Loss over steps, falling">')
    assert check_site(tmp_path) == []
    (tmp_path / "a.html").write_text('<img src="data:,a"><img src="data:,b" alt=""><img src="data:,c" alt="A figure">')
    assert len(check_site(tmp_path)) == 3


@pytest.mark.parametrize(("size", "strip"), [((900, 300), True), ((640, 800), True), ((639, 600), False)])
def test_a_picture_that_is_too_wide_for_a_phone_is_known(size, strip):
    from PIL import Image

    Image.new("L", size).save(file := io.BytesIO(), "PNG")
    page = f'<p><img alt="a" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" class="img-fluid"></p>'
    assert ("img-fluid strip" in load_tool("build_docs").offline(page)) == strip


def test_what_a_cell_printed_is_one_text(tmp_path):
    "A kernel may send it in pieces; warnings and pictures between them stay where they are."
    pieces = [printed("a\n"), printed("b\n"), printed("note\n", "stderr"), printed("c\n"), picture("x"), printed("d\n")]
    path = saved(tmp_path / "a.ipynb", cell("f()", *pieces))
    load_tool("build_docs").join_streams(path)
    outputs = json.loads(path.read_text())["cells"][0]["outputs"]
    assert ["".join(o.get("text", "picture")) for o in outputs] == ["a\nb\n", "note\n", "c\n", "picture", "d\n"]


def test_a_table_of_sentences_is_told_from_one_of_figures():
    offline = load_tool("build_docs").offline
    table = '<table border="1" class="dataframe"><tr><td>%s</td><td>0.1</td></tr></table>'
    assert '"words dataframe"' in offline(table % "Add the missing file, or remove the other")
    assert offline(table % "acme/d7000/im000") == table % "acme/d7000/im000"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_to_files(path):
    "In JupyterLab there are no pages: a link names the notebook, and the docs make the page of it."
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)):
        if not re.match(r"[a-z]+:", link):
            assert (path.parent / link).is_file(), f"{link} in {path.name}; name a file of nbs, such as ../api/00_core.ipynb"
