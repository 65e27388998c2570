"""The widgets in JupyterLab and Notebook 7, in a real Chromium: clicked, painted on, reloaded; screenshots go to build/screenshots."""

import json
import time
import urllib.request

import numpy as np
import pytest
from in_browser import IN_BROWSER, SHOTS, open_notebook

pytestmark = IN_BROWSER

SETUP = """
get_ipython().reset(new_session=False)
import numpy as np, torch
torch.set_num_threads(1)
from aoi_ssl.encoder import PixelEncoder
from aoi_ssl.synthetic import CLASSES, render

def look(seed, image=0, size=512):
    sample = render(seed, image, size=size)
    return torch.from_numpy(sample.image).float() / 255, torch.from_numpy(sample.mask)

image, mask = look(3)
encoder = PixelEncoder(channels=2, mean=image.mean((1, 2)), std=image.std((1, 2)))
"""

TIMED = """w.clicked = [];
w.views[0].viewer.canvas.addEventListener("pointerup", (e) => (w.start = e.timeStamp), true);
w.views[0].viewer.onDrawn = () => { if (w.start) { w.clicked.push(performance.now() - w.start); w.start = 0; } };
return 0;"""
COUNTED = """w.products = 0;
const similarity = w.grids.similarity.bind(w.grids);
w.grids.similarity = (...all) => { w.products++; return similarity(...all); };
return 0;"""
BEGUN = """([i, before]) =>
  document.querySelectorAll(".jp-Notebook .jp-CodeCell")[i].querySelector(".jp-InputPrompt").innerText !== before"""
RAN = """([i, before]) => {
  const cell = document.querySelectorAll(".jp-Notebook .jp-CodeCell")[i], text = cell.querySelector(".jp-InputPrompt").innerText;
  return text !== before && /\\[\\d+\\]/.test(text);
}"""
AT = """const b = v.canvas.getBoundingClientRect(), t = v.transform();
return [b.left + t.left + arg[1] * t.scale, b.top + t.top + arg[0] * t.scale];"""
COLOURS = """const t = v.transform(), r = v.size.ratio, c = v.canvas.getContext("2d");
const one = (x, y) => c.getImageData(Math.round((t.left + x * t.scale) * r), Math.round((t.top + y * t.scale) * r), 1, 1).data;
return arg.map(([y, x]) => [...one(x, y)].slice(0, 3));"""
NIGHT = """() => {
  document.body.dataset.jpThemeLight = "false";
  const colours = { "layout-color0": "#111418", "layout-color1": "#111418", "layout-color2": "#242a31",
    "ui-font-color1": "#e6eaef", "ui-font-color2": "#a3adb8", "border-color1": "#49525c" };
  for (const [name, value] of Object.entries(colours)) document.documentElement.style.setProperty(`--jp-${name}`, value);
}"""


def ask_server(url: str, path: str, method: str = "GET", body: dict | None = None):
    "What the server of JupyterLab or Notebook 7 answers."
    headers = {"Authorization": "token test", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/api/{path}", data=data, method=method, headers=headers)
    return json.load(urllib.request.urlopen(request, timeout=60))


def write_notebook(url: str, name: str, *cells: str) -> str:
    "Put a small notebook into JupyterLab's folder; returns its name."
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    code = [{**empty, "id": f"c{i}", "source": source.strip()} for i, source in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    content = {"cells": code, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    ask_server(url, f"contents/{name}", "PUT", {"type": "notebook", "format": "json", "content": content})
    return name


@pytest.fixture(scope="session")
def kernels() -> dict[str, str]:
    "The kernel of each server, by its address. One for all notebooks: each empties it first, and none has to import torch again."
    return {}


def join_kernel(url: str, name: str, kernels: dict[str, str]) -> None:
    "Give a notebook the kernel of the server, before it is opened and would start one of its own."
    kernel = {"id": kernels[url]} if url in kernels else {"name": "python3"}
    session = ask_server(url, "sessions", "POST", {"path": name, "name": name, "type": "notebook", "kernel": kernel})
    kernels[url] = session["kernel"]["id"]


class Bench:
    "A notebook that is open in JupyterLab or Notebook 7: run its cells, reach its widget."

    def __init__(self, v, application: str, url: str, name: str, kernels: dict[str, str], *cells: str):
        self.v, self.page, self.application, self.url, self.name = v, v.page, application, url, write_notebook(url, name, *cells)
        join_kernel(url, name, kernels)
        open_notebook(v, url, self.name, application=application)
        self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=90_000)
        for _ in range(180):  # a cell that is run before its kernel answers is forgotten
            if self.kernel() == "idle":
                break
            time.sleep(0.5)
        self.page.keyboard.press("Escape")

    def kernel(self) -> str:
        "What the kernel of this notebook is doing, as the server knows it."
        found = ask_server(self.url, "sessions")
        return next((s["kernel"]["execution_state"] for s in found if s["path"] == self.name), "none")

    def run(self, index: int, timeout: int = 120_000) -> str:
        "Run a cell and wait for its end; returns its text output."
        from playwright.sync_api import TimeoutError

        cell = self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)
        before = cell.locator(".jp-InputPrompt").first.inner_text()
        cell.locator(".cm-content").first.click()
        for _ in range(5):  # what is asked before the kernel is there is forgotten
            self.page.keyboard.press("Control+Enter")
            try:
                self.page.wait_for_function(BEGUN, arg=[index, before], timeout=10_000)
                break
            except TimeoutError:
                continue
        self.page.wait_for_function(RAN, arg=[index, before], timeout=timeout)
        error = cell.locator("[data-mime-type='application/vnd.jupyter.error']")
        assert error.count() == 0, error.first.inner_text()
        texts = cell.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stdout']")
        return texts.first.inner_text() if texts.count() else ""

    def ask(self, index: int = 1, until=None):
        "Run the cell that prints JSON; with `until`, again and again until that is true of the answer."
        for _ in range(60):
            text = self.run(index)
            answer = json.loads(text) if text.strip() else None  # its output may come after its number
            if answer is not None and (until is None or until(answer)):
                return answer
            time.sleep(0.2)
        raise AssertionError(str(answer)[:1000])

    def widget(self):
        "The root of the widget, when its first picture is drawn."
        root = self.page.locator(".jp-Notebook .aoi").first
        root.locator(".aoi-view[data-drawn]").first.wait_for(timeout=60_000)
        root.scroll_into_view_if_needed()
        return root

    def js(self, code: str, arg=None):
        "Evaluate in the page, with `w` as the widget's own object."
        return self.page.evaluate(
            f"(arg) => {{ const w = document.querySelector('.jp-Notebook .aoi').parentElement.aoi; {code} }}", arg
        )

    def focus(self) -> None:
        "Give the image of the widget the keyboard, and wait until the notebook, which takes it after a cell, lets go."
        for _ in range(40):
            self.page.locator(".aoi-main canvas").first.focus()
            self.page.wait_for_timeout(150)
            if self.page.evaluate("() => document.activeElement.matches('.aoi-main canvas')"):
                return
        raise AssertionError("the widget does not keep the keyboard")

    def settle(self):
        "Wait until two frames are drawn."
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def at(self, y: float, x: float, viewer: str = "w.views[0].viewer") -> tuple[float, float]:
        "Where on the page an image pixel is."
        return tuple(self.js(f"const v = {viewer}; {AT}", [y, x]))

    def colours(self, places: list, viewer: str = "w.views[0].viewer") -> np.ndarray:
        "The colours of image pixels (y, x) on the page: (n, 3)."
        where = [[float(y), float(x)] for y, x in places]
        return np.array(self.js(f"const v = {viewer}; {COLOURS}", where))

    def shoot(self, name: str, *, page: bool = False) -> None:
        "A screenshot of the widget alone, or of the page."
        root = self.page.locator(".jp-Notebook .aoi").first
        root.scroll_into_view_if_needed()
        self.settle()
        if page:
            return self.v.shoot(self.shot(name))
        SHOTS.mkdir(parents=True, exist_ok=True)
        root.screenshot(path=SHOTS / f"{self.shot(name)}.png")

    def shot(self, name: str) -> str:
        "How a screenshot is called."
        return f"widget-{name}" if self.application == "lab" else f"{self.application}-widget-{name}"


@pytest.fixture
def bench(request, visit, kernels):
    "Open a notebook of some cells in JupyterLab, or in the application that the test names."
    opened, application = [], getattr(request, "param", "lab")
    url = request.getfixturevalue(application)

    def open_bench(name: str, *cells: str, width: int = 1280, height: int = 900) -> Bench:
        opened.append(Bench(visit(width, height), application, url, name, kernels, *cells))
        return opened[-1]

    yield open_bench
    for b in opened:
        assert b.v.outside() == [], "the page asked another host"


everywhere = pytest.mark.parametrize("bench", ["lab", "notebook"], indirect=True)


# explore


BANK = (
    SETUP
    + """
from aoi_ssl.remember import remember_image
from aoi_ssl.retrieval import MemoryBank

def small_bank(seeds):
    parts, records, images = [], [], {}
    for n, seed in enumerate(seeds):
        picture, labels = look(seed, 5)
        parts.append(remember_image({"image": picture, "mask": labels, "ignore": None}, encoder, number=n))
        stem, size = f"acme_d{seed:03}_05", {"height": 512, "width": 512}
        records.append({"stem": stem, "device": f"d{seed:03}", **size, "classes": list(CLASSES)})
        images[stem] = picture
    tensors = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    return MemoryBank(encoder, CLASSES, tensors, records), images

bank, bank_images = small_bank([3, 4])
"""
)
EXPLORE = (
    BANK
    + """
from aoi_ssl.explore import explore
handle = explore(image, encoder, bank, others=[look(3, 1)[0], look(4)[0]], bank_images=bank_images)
handle
"""
)
ASK_EXPLORE = """
import json
found = handle.similarity
names = ("held", "threshold", "overlay", "error", "light", "near", "view", "place")
print(json.dumps({n: getattr(handle, n) for n in names} | {"map": None if found is None else found.round(4).tolist()}))
"""


def wire_patches(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    "Patches of 16 pixels that a wire crosses, and those without any: (n, 2) rows and columns."
    from aoi_ssl.synthetic import render

    share = render(seed, 0, size=512).mask.reshape(4, 32, 16, 32, 16).mean((2, 4))
    return np.argwhere((share[0] > 0.15) & (share[1] == 0)), np.argwhere(share.sum(0) == 0)


@everywhere
def test_explore(bench):
    "Click a wire patch: the trait says so, other wires light up; threshold, keys, bank, reload."
    b = bench("explore.ipynb", EXPLORE, ASK_EXPLORE, height=1150)
    b.run(0)
    b.widget()
    b.shoot("explore-before")
    wires, others = wire_patches()
    row, column = wires[len(wires) // 2].tolist()
    before = b.colours((wires + 0.5) * 16)
    b.js(TIMED)
    b.page.mouse.click(*b.at(row * 16 + 8, column * 16 + 8))
    b.settle()
    for y, x in wires[[3, 30, 60]].tolist():
        b.page.keyboard.down("Shift")
        b.page.mouse.click(*b.at(y * 16 + 8, x * 16 + 8))
        b.page.keyboard.up("Shift")
        b.settle()
    b.page.mouse.move(5, 5)
    answer = b.ask(until=lambda a: len(a["held"]) == 4 and a["near"])
    assert answer["held"][0] == {"image": 0, "row": row, "column": column, "minus": False} and answer["error"] == ""
    print("\nclick to picture, 512x512, ms:", [round(t) for t in b.js("return w.clicked;")])
    b.shoot("explore-held")

    found = np.array(answer["map"])  # what Python computed: wires are more alike to wires than to what bears none
    rest = np.array([w for w in wires.tolist() if w not in [[h["row"], h["column"]] for h in answer["held"]]])
    of = lambda places: found[tuple(places.T)]
    assert (of(rest)[:, None] > of(others)[None]).mean() > 0.65
    page = np.array(b.js("return [...w.maps[0]];")).reshape(32, 32)  # what the page computed is the same
    assert np.abs(page - found).max() < 0.01
    green = lambda places: np.subtract(*b.colours((places + 0.3) * 16)[:, [1, 0]].astype(int).T).mean()
    assert green(rest) > green(others) + 15, "the scale runs from violet to green: wires are not greener than the rest"
    assert np.abs(b.colours((wires + 0.5) * 16).astype(int) - before.astype(int)).mean() > 10

    slider = b.page.get_by_role("slider", name="Threshold")  # only what is similar enough is coloured
    slider.focus()
    slider.fill(str(round(float(np.quantile(found, 0.9)), 2)))
    b.page.mouse.move(5, 5)
    answer = b.ask(until=lambda a: a["threshold"])
    above = found > answer["threshold"] + 0.01
    b.js("w.model.set('opacity', 1); w.model.save_changes(); return 0;")
    b.settle()
    dull = b.colours((np.argwhere(~above & (found < answer["threshold"] - 0.01)) + 0.3) * 16)
    assert (np.ptp(dull, axis=1) <= 2).mean() > 0.95, "below the threshold the image is grey"
    bright = b.colours((np.argwhere(above) + 0.3) * 16)
    assert (np.ptp(bright, axis=1) > 20).mean() > 0.95
    b.shoot("explore-threshold")

    b.page.locator(".aoi-near button").first.click()  # a neighbour in its place
    b.page.locator(".aoi-more .aoi-view[data-drawn]").first.wait_for()
    assert b.ask(until=lambda a: a["place"])["place"]["key"] == answer["near"][0]["key"]
    b.js("w.model.set('opacity', 0.65); w.model.set('threshold', null); w.model.save_changes(); return 0;")
    b.shoot("explore-place")


def test_explore_by_keyboard_and_after_a_reload(bench):
    "Arrows, Enter and Esc; traits from Python; an error in the widget; what was held is there after a reload."
    cells = "handle.overlay = 'pca'; handle.light = 'colour'", "handle.set_state({'light': 9})"
    b = bench("explore-keys.ipynb", EXPLORE, ASK_EXPLORE, *cells)
    b.run(0)
    b.widget()
    canvas = b.page.locator(".aoi-main canvas").first
    canvas.focus()
    for key in ["ArrowRight"] * 3 + ["ArrowDown", "Enter", "Shift+ArrowRight", "Shift+Enter", "ArrowUp", "Alt+Enter"]:
        b.page.keyboard.press(key)
    held = b.ask(until=lambda a: len(a["held"]) == 3)["held"]
    assert [(h["row"], h["column"], h["minus"]) for h in held] == [(17, 19, False), (17, 23, False), (16, 23, True)]
    canvas.focus()
    b.page.keyboard.press("+")
    b.page.keyboard.press("+")
    view = b.ask(until=lambda a: a["view"]["zoom"] > 1)["view"]
    b.run(2)
    b.settle()
    assert b.js("return w.get('overlay');") == "pca"
    b.shoot("explore-pca")
    b.run(3)
    b.page.get_by_role("alert").filter(has_text="light=9").wait_for()
    assert b.ask()["light"] == "colour"
    b.shoot("explore-error")
    b.page.get_by_role("radio", name="Light 0").focus()
    b.page.keyboard.press("ArrowRight")
    assert b.ask(until=lambda a: a["light"] == 1)["light"] == 1
    b.page.keyboard.press("Control+s")
    b.page.wait_for_timeout(500)
    b.page.reload()
    b.widget()
    b.page.locator(".aoi-chip").nth(2).wait_for()
    assert b.js("return w.get('view').zoom;") == view["zoom"]
    b.page.locator(".aoi-main canvas").first.focus()
    b.page.keyboard.press("Escape")
    assert b.ask(until=lambda a: not a["held"])["held"] == []
    b.shoot("explore-reloaded")


def test_explore_large_and_dark(bench):
    "2048 x 2048 pixels, 16384 patches: still at once; a dark theme."
    large = EXPLORE.replace("image, mask = look(3)", "image, mask = look(3, size=2048)")
    large = large[: large.index("handle = ")] + "handle = explore(image, encoder, held=[(1024, 1024)])\nhandle"
    b = bench("explore-large.ipynb", large, ASK_EXPLORE)
    b.run(0)
    b.widget()
    b.js(TIMED)
    b.js(COUNTED)
    for y, x in [(500, 500), (900, 1300), (1500, 700)]:
        b.page.mouse.click(*b.at(y, x))
        b.settle()
    assert b.js("return w.products;") == 3  # a click costs one product of all embeddings, not two
    print("\nclick to picture, 2048x2048, ms:", [round(t) for t in b.js("return w.clicked;")])
    b.page.locator(".aoi-main canvas").first.focus()
    for _ in range(6):
        b.page.keyboard.press("+")
    tiles = "document.querySelector('.jp-Notebook .aoi').parentElement.aoi.views[0].source.tiles"
    b.page.wait_for_function(f"() => [...{tiles}.values()].some((t) => t.planes)")
    b.page.emulate_media(color_scheme="dark")
    b.page.evaluate(NIGHT)
    b.shoot("explore-large-dark")


# inspect


INSPECT = (
    BANK
    + """
from aoi_ssl.encoder import PixelEncoder
from aoi_ssl.inspect import inspect
fine = PixelEncoder(channels=2, patch_size=8, mean=image.mean((1, 2)), std=image.std((1, 2)))
encoder, coarse = fine, bank
finer, _ = small_bank([3, 4])
handle = inspect({"image": image, "stem": "acme_d003_00", "mask": mask, "ignore": None}, {"16 px": coarse, "8 px": finer},
                 bank_images=bank_images)
handle
"""
)
ASK_INSPECT = """
import json
names = ("thresholds", "overlay", "error", "shown", "pixel", "why", "view", "place")
areas = {n: m.sum((1, 2)).tolist() for n, m in handle.masks.items()}
ious = handle.scores.set_index(["segmenter", "class"])["iou"].round(4)
print(json.dumps({n: getattr(handle, n) for n in names} | {
    "areas": areas, "iou": [[ious[n, c] for c in handle.classes] for n in handle.segmenters],
    "near": [n["key"] for n in handle.near], "own": coarse.thresholds.tolist()}))
"""


@everywhere
def test_inspect(bench):
    "A threshold changes the mask and the IoU; errors; why this pixel; a class off; zoom in both."
    b = bench("inspect.ipynb", INSPECT, ASK_INSPECT, height=1400)
    b.run(0)
    b.widget()
    b.page.locator(".aoi-line b", has_text="IoU 0").first.wait_for()
    b.shoot("inspect-before")
    first = b.ask()
    epoxy = "16 px", 3
    b.js("w.drawn = 0; w.views[0].viewer.onDrawn = () => { w.ms = performance.now() - w.t0; }; return 0;")
    slider = b.page.get_by_role("slider", name="threshold of epoxy, 16 px")
    places = np.argwhere(np.ones((64, 64))) * 8 + 4.0
    before = b.colours(places)
    b.js("w.t0 = performance.now(); return 0;")
    slider.fill("0.9")
    b.settle()
    print("\nthreshold to picture, 512x512, ms:", round(b.js("return w.ms;")))
    after = b.ask(until=lambda a: a["thresholds"][0][3] == 0.9)
    assert after["areas"]["16 px"][3] < first["areas"]["16 px"][3] and after["areas"]["8 px"] == first["areas"]["8 px"]
    assert (np.abs(b.colours(places).astype(int) - before.astype(int)).sum(1) > 20).sum() > 20, "no pixel changed"
    shown = b.page.locator(".aoi-classes > div").nth(epoxy[1]).locator(".aoi-line b").first.inner_text()
    assert shown == f"IoU {after['iou'][0][3]:.2f}"
    slider.fill("0.5")

    b.page.get_by_role("radio", name="Errors").click()
    b.shoot("inspect-errors")
    b.page.get_by_role("radio", name="Probability").click()
    b.shoot("inspect-probability")
    b.page.get_by_role("radio", name="Mask").click()
    b.page.get_by_role("button", name="epoxy").first.click()
    assert b.ask(until=lambda a: not a["shown"][3])["shown"] == [True, True, True, False]

    wires, _ = wire_patches()
    y, x = (wires[40] * 16 + 8).tolist()
    b.page.locator(".aoi-views canvas").first.scroll_into_view_if_needed()
    b.page.mouse.click(*b.at(y, x))
    answer = b.ask(until=lambda a: a["near"])
    assert abs(answer["pixel"]["y"] - y) <= 1 and len(answer["why"]) == 2 and answer["error"] == ""
    assert b.page.locator(".aoi-bank").all_inner_texts() == ["Remembered by 16 px", "Remembered by 8 px"]
    b.page.set_viewport_size({"width": 1280, "height": 800})  # the answer is where the eye is: beside the pictures
    b.page.locator(".aoi-views canvas").first.scroll_into_view_if_needed()
    b.settle()
    b.shoot("inspect-answer")
    parts = [".aoi-answer table", ".aoi-near button >> nth=0", ".aoi-near button >> nth=-1"]
    boxes = [b.page.locator(part).first.bounding_box() for part in parts]
    assert all(0 < box["y"] and box["y"] + box["height"] < 800 for box in boxes), boxes
    b.page.locator(".aoi-near button").first.click()
    b.page.locator(".aoi-views figure .aoi-legend").first.wait_for()
    b.settle()
    b.shoot("inspect-place")
    box = b.page.locator(".aoi-views figure", has=b.page.locator(".aoi-legend")).last.bounding_box()
    assert 0 < box["y"] < 500, box
    b.page.set_viewport_size({"width": 1280, "height": 1400})
    slider.fill("0.6")  # a threshold moves nothing but the mask
    answer = b.ask(until=lambda a: a["thresholds"][0][3] == 0.6)
    assert answer["place"]["bank"] == "16 px" and b.page.locator(".aoi-views figure .aoi-legend").first.is_visible()
    slider.fill("0.5")
    b.js("w.paint = () => { throw new Error('no brush'); }; w.refresh(); return 0;")  # what fails in the page is told in Python
    assert "no brush" in b.ask(until=lambda a: a["error"])["error"]
    b.page.locator(".aoi-error", has_text="no brush").wait_for()
    b.js("delete w.paint; w.refresh(); return 0;")
    b.page.get_by_role("button", name="Dismiss the error").click()
    b.ask(until=lambda a: not a["error"])
    b.page.locator(".aoi-views canvas").first.focus()
    for _ in range(5):
        b.page.keyboard.press("+")
    b.settle()
    views = b.js("return w.views.map((v) => v.viewer.view.zoom);")
    assert views[0] > 2 and len(set(views)) == 1
    b.shoot("inspect-why")
    b.page.get_by_role("button", name="Give the thresholds to the segmenters").click()
    assert b.ask(until=lambda a: a["own"][3] == 0.5)["error"] == ""


NOVELTY = (
    BANK
    + """
from aoi_ssl.inspect import inspect
from aoi_ssl.defects import paste_defect
from aoi_ssl.novelty import calibrate_novelty
known = [look(3, n) for n in (5, 6, 7)]
parts = [remember_image({"image": i, "mask": m, "ignore": None}, encoder, number=n) for n, (i, m) in enumerate(known)]
records = [{"stem": f"d003_{n}", "device": "d003", "height": 512, "width": 512, "classes": list(CLASSES)} for n in range(3)]
bank = MemoryBank(encoder, CLASSES, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, records)
other, _ = small_bank([3])
calibrate_novelty(bank)
made, where = paste_defect(image, "blob", seed=7)
handle = inspect(made, {"calibrated": bank, "not": other})
handle
"""
)
ASK_NOVELTY = """
import json
found = handle.novelty.maps["calibrated"]
y, x = np.argwhere(where.numpy()).mean(0)
print(json.dumps({"overlay": handle.overlay, "notes": handle.novelty_notes, "error": handle.error, "spot": [y, x],
                  "in": float(found[where].mean()), "out": float(found[~where].mean()), "limits": handle.novelty_limits}))
"""


def test_inspect_tells_what_is_new(bench):
    "Novelty over the image, a sentence on trust, and what to do for a bank that was not calibrated."
    b = bench("trust.ipynb", NOVELTY, ASK_NOVELTY, height=1150)
    b.run(0)
    b.widget()
    first = b.ask()
    assert first["in"] > 1.5 * first["out"] and "calibrate_novelty" in first["notes"][1] and first["limits"][0] == 0
    notes = b.page.locator(".aoi-side .aoi-note").all_inner_texts()
    assert any("pixels are new" in n for n in notes) and any("calibrate_novelty" in n for n in notes)
    b.page.get_by_role("radio", name="Novelty").click()
    b.settle()
    assert b.ask(until=lambda a: a["overlay"] == "novelty")["error"] == ""
    assert "1: the limit" in b.page.locator(".aoi-legend").first.inner_text()
    spot = [[first["spot"][0] + dy, first["spot"][1] + dx] for dy in (-4, 0, 4) for dx in (-4, 0, 4)]
    both = [b.colours(spot, f"w.views[{n}].viewer").astype(int).sum(1).mean() for n in (0, 1)]
    calm = b.colours([[8 * i, 20] for i in range(4, 60)]).astype(int).sum(1).mean()
    print("novelty colours: in the blob", both, "elsewhere", calm)
    assert both[0] > calm
    b.shoot("inspect-novelty")


# teach


TEACH = (
    SETUP
    + """
from aoi_ssl.teach import teach
images = {f"acme_d003_{i:02}": look(3, i)[0] for i in range(3)}
handle = teach(images, encoder, classes=CLASSES, out="taught")
handle
"""
)
ASK_TEACH = """
import json, pathlib
names = ("index", "tool", "brush", "error", "question", "state", "cuts", "by_hand")
print(json.dumps({n: getattr(handle, n) for n in names} | {
    "labels": handle.labels.sum((1, 2)).tolist(), "known": int(handle.known.sum()), "keys": len(handle.bank.keys),
    "predicted": (handle.prediction > np.array(handle.cuts)[:, None, None]).sum((1, 2)).tolist(),
    "files": sorted(p.name for p in pathlib.Path("taught").glob("*.png"))}))
"""


def bonds(seed: int = 3) -> dict[str, list]:
    "Centres (y, x) of the parts of each class in the image that is painted."
    from scipy import ndimage

    from aoi_ssl.synthetic import CLASSES, render

    mask = render(seed, 0, size=512).mask
    parts = {name: ndimage.label(m) for name, m in zip(CLASSES, mask, strict=True)}
    return {
        n: [(float(y) + 0.5, float(x) + 0.5) for y, x in ndimage.center_of_mass(m > 0, m, range(1, k + 1))]
        for n, (m, k) in parts.items()
    }


def drag(b, *points: tuple[float, float]) -> None:
    "Press at the first place (y, x), move over the others, let go."
    b.page.mouse.move(*b.at(*points[0]))
    b.page.mouse.down()
    for p in points[1:]:
        b.page.mouse.move(*b.at(*p), steps=4)
    b.page.mouse.up()


@everywhere
def test_teach(bench):
    "Paint a wedge: the trait, the pixels and the prediction change; tools, undo, accept, save, restart."
    b = bench(
        "teach.ipynb", TEACH, ASK_TEACH, "handle.paint('epoxy', 'circle', [(40, 40), (60, 40)]); None", height=1000
    )
    b.run(0)
    b.widget()
    assert b.ask()["known"] == 0
    place, palette = bonds(), b.page.locator(".aoi-palette")
    palette.get_by_role("button", name="background").click()
    b.page.get_by_role("slider", name="Width").fill("24")
    b.page.locator(".aoi-main canvas").scroll_into_view_if_needed()
    drag(b, (470, 60), (470, 440))
    drag(b, (40, 60), (40, 440))
    answer = b.ask(until=lambda a: a["known"] > 15000 and a["keys"])
    assert answer["predicted"] == [0, 0, 0, 0] and answer["error"] == ""
    b.page.get_by_role("slider", name="Width").fill("6")
    palette.get_by_role("button", name="wedge").click()
    y, x = place["wedge"][0]
    before = b.colours([(y, x)])
    drag(b, (y, x - 4), (y, x + 4))
    answer = b.ask(until=lambda a: a["labels"][2] > 0 and a["predicted"][2])
    assert 30 < answer["labels"][2] < 120 and answer["predicted"][2] > 0 and answer["error"] == "", (
        "a wedge is predicted"
    )
    b.page.wait_for_function("() => document.querySelector('.jp-Notebook .aoi').parentElement.aoi.pending.size === 0")
    b.settle()
    after = b.colours([(y, x)]).astype(int)
    assert np.abs(after - before.astype(int)).sum() > 40 and after[0][0] > after[0][2] + 20, "the wedge is yellow"
    first = answer["predicted"]

    b.page.get_by_role("button", name="Circle").click()  # balls
    palette.get_by_role("button", name="ball").click()
    for y, x in place["ball"][:4]:
        drag(b, (y, x), (y + 6, x))
    b.page.get_by_role("button", name="Line (L)").click()
    palette.get_by_role("button", name="wire").click()
    drag(b, (66, 100), (142, 214))
    answer = b.ask(until=lambda a: a["labels"][0] and a["labels"][1] and a["predicted"][1])
    assert answer["predicted"] != first, "what was painted changes the prediction"
    b.page.mouse.move(5, 5)
    b.shoot("teach-painted")

    known = answer["known"]
    b.focus()
    b.page.keyboard.press("Control+z")
    b.ask(until=lambda a: a["known"] < known)
    b.focus()
    b.page.keyboard.press("Control+Shift+z")
    b.ask(until=lambda a: a["known"] == known)
    b.page.get_by_role("button", name="Polygon").click()
    palette.get_by_role("button", name="epoxy").click()
    for y, x in [(130, 100), (130, 130), (160, 130), (160, 100)]:
        b.page.mouse.click(*b.at(y, x))
    b.focus()
    b.page.keyboard.press("Enter")
    assert b.ask(until=lambda a: a["labels"][3])["labels"][3] == 900
    cells = b.page.locator(".jp-Notebook .jp-CodeCell").count()
    b.focus()
    for key in ("e", "b", "f", "2", "]", "ArrowRight", "Enter"):
        b.page.keyboard.press(key)
    answer = b.ask(until=lambda a: a["tool"] == "flood" and a["brush"] == "ball")
    assert b.page.locator(".jp-Notebook .jp-CodeCell").count() == cells, (
        "a key of the widget was taken for one of the notebook"
    )
    b.run(2)
    b.page.get_by_role("button", name="Accept").click()
    b.ask(until=lambda a: a["known"] == 512 * 512)
    b.shoot("teach-accepted")

    b.page.get_by_role("button", name="Save the masks").click()
    files = b.ask(until=lambda a: a["files"])["files"]
    assert "acme_d003_00_wire.png" in files
    b.page.locator(".aoi-pager").get_by_role("button", name="Next image (N)").click()
    answer = b.ask(until=lambda a: a["index"] == 1)
    assert answer["known"] == 0 and sum(answer["predicted"]) > 0
    b.page.wait_for_function(
        "() => document.querySelector('.jp-Notebook .aoi .aoi-main figcaption').innerText.includes('d003_01')"
    )
    b.shoot("teach-next")
    b.page.get_by_role("button", name="The image that would teach most").click()
    answer = b.ask(until=lambda a: "is suggested" in a["state"]["hint"])
    assert answer["index"] in (1, 2) and answer["error"] == ""
    b.shoot("teach-suggested")

    b.run(
        0
    )  # a new session with the same journal: everything is there again, and what is saved is not replaced unasked
    b.page.wait_for_timeout(300)
    b.widget()
    answer = b.ask(until=lambda a: a["index"] == 0)
    assert answer["known"] == 512 * 512 and answer["keys"] > 0
    b.page.get_by_role("button", name="Save the masks").click()
    b.page.locator(".aoi-question").wait_for()
    b.shoot("teach-question")
    b.page.get_by_role("button", name="Save nothing").click()
    assert b.ask(until=lambda a: not a["question"])["error"] == ""

    b.page.locator(".aoi-pager").get_by_role("button", name="Next image (N)").click()  # what is painted is there after a reload
    b.ask(until=lambda a: a["index"] == 1)
    b.run(2)
    assert b.ask()["known"] > 1000
    b.page.keyboard.press("Control+s")
    b.page.wait_for_timeout(500)
    b.page.reload()
    b.widget()
    known = "document.querySelector('.jp-Notebook .aoi').parentElement.aoi.views[0].source.whole?.planes[6]"
    b.page.wait_for_function(f"() => {known}?.some((v) => v > 0)")

    threshold = b.page.get_by_role("slider", name="threshold of wire")  # a threshold by hand, and what it does to an accepted image
    threshold.fill("1")
    answer = b.ask(until=lambda a: a["by_hand"] == ["wire"])
    assert answer["cuts"][0] == 1 and answer["predicted"][0] == 0
    b.page.get_by_role("button", name="Accept").click()
    note = b.page.locator(".aoi-odd li", has_text="wire covers 0.00%")
    note.wait_for()
    b.shoot("teach-odd")
    b.page.get_by_role("button", name="Set by hand").click()
    answer = b.ask(until=lambda a: a["by_hand"] == [] and a["cuts"][0] != 1)  # messages are handled beside the cells
    assert 0 < answer["cuts"][0] < 1 and answer["error"] == ""
    b.page.wait_for_function("([input, cut]) => Math.abs(input.value - cut) < 0.011", arg=[threshold.element_handle(), answer["cuts"][0]])


def polygon_by_keys(b) -> None:
    "Paint a square of epoxy, 24 pixels wide, by keyboard alone."
    b.focus()
    for key in ["p", "4"] + ["Shift+ArrowLeft"] * 3 + ["Enter", "Shift+ArrowRight"] + ["ArrowRight"] * 8 + ["Enter", "Enter"]:
        b.page.keyboard.press(key)
    assert "three corners" in b.page.locator(".aoi-status").inner_text()  # a corner given twice closes nothing yet
    for key in ["Shift+ArrowDown"] + ["ArrowDown"] * 8 + ["Enter", "Shift+ArrowLeft"] + ["ArrowLeft"] * 8 + ["Enter", "Enter"]:
        b.page.keyboard.press(key)


def test_teach_without_a_mouse_and_without_a_kernel(bench):
    "A polygon by keyboard, and by double click; labels survive a restart unasked, and who paints on a dead kernel is told."
    code = TEACH.replace("look(3, i)", "look(3, i, 1100)").replace(', out="taught"', "")
    b = bench("teach-kernel.ipynb", code, ASK_TEACH, "None")
    b.run(0)
    b.widget()
    polygon_by_keys(b)
    assert b.ask(until=lambda a: a["labels"][3])["labels"][3] == 24 * 24
    b.page.locator(".aoi-palette").get_by_role("button", name="ball").click()
    b.page.locator(".aoi-main canvas").scroll_into_view_if_needed()
    for y, x in [(80, 80), (80, 240)]:
        b.page.mouse.click(*b.at(y, x))
    b.page.mouse.dblclick(*b.at(240, 240))
    answer = b.ask(until=lambda a: a["labels"][1])
    assert abs(answer["labels"][1] - 12800) < 700 and answer["error"] == ""
    assert b.js("return w.shape;") is None and b.page.locator(".aoi-silent").is_hidden()
    shown = "w.views[0].source.whole.planes"  # half of 1100 pixels: lights, labels, what is known, what is predicted
    area = b.js(f"return [3, 6, 8].map((n) => {shown}[n].reduce((sum, v) => sum + (v > 127), 0));")
    assert abs(area[0] - answer["labels"][1] / 4) < 200 and abs(area[1] - answer["known"] / 4) < 200 and area[2] > 0
    b.page.mouse.move(5, 5)
    b.shoot("teach-large")

    ask_server(b.url, f"kernels/{kernel_of(b)}/restart", "POST")
    b.focus()
    b.page.keyboard.press("l")
    drag(b, (800, 80), (800, 240))
    silent = b.page.locator(".aoi-silent")
    silent.wait_for(timeout=20_000)
    assert "run the cell again" in silent.inner_text() and "1 stroke is not taken" in silent.inner_text()
    b.shoot("teach-no-kernel")
    b.run(2)  # so that the number of the first cell is another than before
    b.run(0)
    b.page.wait_for_timeout(300)
    b.widget()
    again = b.ask(until=lambda a: a["known"])
    assert again["labels"] == answer["labels"] and b.page.locator(".aoi-silent").is_hidden()
    assert "2 steps were done again" in b.page.locator(".aoi-kept").inner_text()
    b.shoot("teach-again")


def kernel_of(b) -> str:
    "The id of the kernel of a notebook."
    return next(s["kernel"]["id"] for s in ask_server(b.url, "sessions") if s["path"] == b.name)


# watch


WATCH = (
    SETUP
    + """
import pandas as pd
from aoi_ssl.encoder import ViTEncoder, mae_config, new_vit
from aoi_ssl.pretrain import Pretrained
from aoi_ssl.watch import watch
from transformers import ViTMAEForPreTraining
mae = new_vit(mae_config("nano", image_size=64), model=ViTMAEForPreTraining).eval()
steps = np.arange(1500)
rng = np.random.default_rng(0)
loss = 0.4 + np.exp(-steps / 300) + rng.normal(0, 0.05, 1500)
history = pd.DataFrame({"step": steps, "seconds": steps * 0.2, "lr": 1e-3, "loss": loss})
history.loc[99::100, "validation_loss"] = 0.45 + np.exp(-steps[99::100] / 300)
history.loc[99::100, "validation_score"] = 0.8 - np.exp(-steps[99::100] / 300)
run = Pretrained(ViTEncoder(mae.vit, mean=image.mean((1, 2)), std=image.std((1, 2))), mae, history)

handle = watch(run, image, held=(256, 256))
handle
"""
)
ASK_WATCH = """
import json
names = ("mask_ratio", "held", "log", "error", "status")
print(json.dumps({n: getattr(handle, n) for n in names} | {"hidden": handle.rebuilt.hidden.float().mean().item()}))
"""


@everywhere
def test_watch(bench):
    "Curves; the mask ratio redraws; a click changes the patch that is followed."
    b = bench("watch.ipynb", WATCH, ASK_WATCH, height=1500)
    b.run(0)
    b.widget()
    assert b.page.locator(".aoi-chart").count() == 2
    b.shoot("watch-before")
    slider = b.page.get_by_role("slider", name="Mask ratio")
    before = b.colours([(y, x) for y in range(8, 512, 16) for x in range(8, 512, 16)], "w.pictures[1].viewer")
    slider.fill("0.3")
    slider.dispatch_event("change")
    answer = b.ask(until=lambda a: a["mask_ratio"] == 0.3)
    assert abs(answer["hidden"] - 0.3) < 0.05 and answer["error"] == ""
    b.page.wait_for_timeout(500)
    after = b.colours([(y, x) for y in range(8, 512, 16) for x in range(8, 512, 16)], "w.pictures[1].viewer")
    assert (np.ptp(after.astype(int), axis=0) > 0).all() and np.abs(after.astype(int) - before.astype(int)).mean() > 5
    b.page.locator(".aoi-section canvas").last.scroll_into_view_if_needed()
    b.page.mouse.click(*b.at(100, 300, "w.times[1].viewer"))
    assert b.ask(until=lambda a: a["held"] != [256, 256])["error"] == ""
    b.page.get_by_role("button", name="Logarithmic").click()
    assert b.ask(until=lambda a: a["log"])["log"]
    b.shoot("watch-after")


# saved


def test_a_saved_notebook_shows_a_picture(lab, visit):
    "Without a kernel there is the static picture, neither a blank nor an error."
    v = visit(1280, 900)
    open_notebook(v, lab, "api/19_explore.ipynb")
    picture = v.page.locator(".jp-OutputArea-output[data-mime-type='image/png'] img").first
    picture.scroll_into_view_if_needed()
    picture.wait_for()
    assert v.page.locator(".jp-OutputArea-output", has_text="Error displaying widget").count() == 0
    v.shoot("widget-saved")
    assert v.outside() == []


def test_a_notebook_of_ones_own_shows_a_picture(bench):
    "Run, saved, its kernel gone, opened again: JupyterLab trusts it, and still there is the picture, and no error."
    b = bench("own.ipynb", EXPLORE)
    b.run(0)
    b.widget()
    picture = b.page.locator(".jp-Notebook .jp-OutputArea-output[data-mime-type='image/png'] img").first
    note = b.page.get_by_text("A picture of the widget")
    picture.wait_for(state="attached")
    assert not picture.is_visible() and not note.is_visible()  # the widget itself is there
    b.focus()
    for _ in range(20):  # on a busy machine the outputs may come after a first save
        b.page.keyboard.press("Control+s")  # the notebook's own, though the widget has the keyboard
        b.page.wait_for_timeout(500)
        saved = ask_server(b.url, f"contents/{b.name}?content=1")["content"]["cells"][0]
        if saved["outputs"]:
            break
    assert saved["metadata"]["trusted"] and len(saved["outputs"]) == 3
    session = next(s for s in ask_server(b.url, "sessions") if s["path"] == b.name)
    ask_server(b.url, f"kernels/{session['kernel']['id']}/restart", "POST", {})
    b.page.reload()
    picture.wait_for(timeout=90_000)
    note.wait_for()
    b.page.wait_for_timeout(3000)  # time for the page to look for the widget, and to find none
    assert b.page.locator(".jp-Notebook .aoi").count() == 0
    left = b.page.locator(".jp-Notebook .jp-OutputArea-child", has_text="widget")
    assert [part.inner_text() for part in left.all() if part.is_visible()] == ["A picture of the widget. Run the cell to use it."]
    b.v.shoot("widget-saved-own")
