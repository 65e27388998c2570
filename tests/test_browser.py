"""The tutorial in JupyterLab and the docs site, in a real Chromium; screenshots go to build/screenshots."""

import json

import pytest
from in_browser import IN_BROWSER, ROOT, open_notebook

pytestmark = IN_BROWSER


# the docs site


def test_docs_landing_page(site, visit):
    v = visit()
    v.page.goto(f"{site}/index.html")
    assert "aoi_ssl" in v.page.title()
    v.shoot("docs-landing")
    links = v.page.locator("#quarto-sidebar a.sidebar-link")
    assert links.count() >= 10
    links.filter(has_text="retrieval").last.click()  # navigation leads to the page that it names
    v.page.wait_for_url("**/api/retrieval.html")
    assert v.outside() == [] and v.errors == []


def test_docs_api_page_has_a_parameter_table(site, visit):
    v = visit()
    v.page.goto(f"{site}/api/core.html")
    tables = v.page.locator("table", has=v.page.locator("th", has_text="meaning"))
    assert tables.count() >= 3
    row = tables.first.locator("tbody tr").first
    assert row.locator("td").first.inner_text() and row.locator("td").last.inner_text()
    v.page.locator("h3", has_text="step_seed").scroll_into_view_if_needed()
    v.shoot("docs-api")
    assert v.outside() == [] and v.errors == []


def test_docs_search_finds_a_name(site, visit):
    v = visit()
    v.page.goto(f"{site}/index.html")
    v.page.locator("input[type=search]").first.fill("atomic_path")
    v.page.locator("a[href*='api/core.html']", has_text="atomic_path").first.wait_for()
    v.shoot("docs-search")
    assert v.outside() == [] and v.errors == []


def test_docs_tutorial_shows_its_pictures_on_a_phone(site, visit):
    v = visit(390, 844)
    v.page.goto(f"{site}/tutorials/quickstart.html")
    v.page.wait_for_load_state("load")
    v.shoot("docs-tutorial-phone", full_page=True)
    pictures = v.page.locator("main img")
    for n in range(pictures.count()):
        pictures.nth(n).scroll_into_view_if_needed()
    broken = "[...document.querySelectorAll('main img')].filter(i => !i.complete || !i.naturalWidth).length"
    v.page.wait_for_function(f"() => {broken} === 0")
    assert pictures.count() >= 1
    wide = v.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 1, f"the page is {wide} px wider than a phone"
    assert v.outside() == [] and v.errors == []


# notebooks in JupyterLab


def expected(path: str) -> tuple[int, int]:
    "Cells and pictures that a notebook has."
    cells = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))["cells"]
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    return len(cells), sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.mark.parametrize("name", ["quickstart", "meet_the_data", "what_a_vit_sees", "three_labels"])
def test_a_tutorial_renders_in_jupyterlab(lab, visit, name):
    "Every cell is drawn, no output is an error, every committed picture shows."
    path = f"tutorials/{name}.ipynb"
    cells, pictures = expected(path)
    v = visit(1400, 1000)
    open_notebook(v, lab, path)
    v.page.wait_for_function(f"document.querySelectorAll('.jp-Notebook .jp-Cell').length >= {cells}")
    images = "[...document.querySelectorAll('.jp-OutputArea-output img')]"
    v.page.wait_for_function(f"{images}.filter(i => i.complete && i.naturalWidth).length >= {pictures}")
    assert pictures >= 1
    assert v.page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    v.shoot(f"lab-{name}")
    v.page.locator(".jp-OutputArea-output img").last.scroll_into_view_if_needed()
    v.shoot(f"lab-{name}-last-picture")
    assert v.outside() == []


def test_a_cell_runs_in_jupyterlab(lab, visit):
    "The kernel of this environment starts, imports the package, and its answer reaches the page."
    import aoi_ssl

    v = visit()
    open_notebook(v, lab, "small.ipynb")
    # a cell that is run before its kernel answers is forgotten
    v.page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=90_000)
    v.page.locator(".jp-Notebook .cm-content").first.click()
    v.page.keyboard.press("Shift+Enter")
    output = v.page.locator(".jp-OutputArea-output", has_text="aoi_ssl").first
    output.wait_for(timeout=90_000)
    assert output.inner_text().strip() == f"aoi_ssl {aoi_ssl.__version__} 42"
    v.shoot("lab-cell")
    assert v.outside() == []
