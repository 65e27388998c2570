"""The pictures in nbs/images that no notebook draws: the new device of the first page, and the widgets in their pages.

    python tools/make_images.py new_device    # from the counts of the report: the image in the middle
    python tools/make_images.py widgets       # JupyterLab in headless Chromium, by the scenes of tests/test_browser_widgets.py

Both where neither is named. The pictures of the widgets have 256 colours, chosen so that rare ones are kept."""

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "nbs" / "images"
WORK = ROOT / "build" / "images"
PICTURES = {  # picture -> screenshot of a scene
    "explore_before": "explore-before", "explore": "explore-place", "inspect_before": "inspect-before", "inspect": "inspect-why",
    "novelty": "inspect-novelty", "teach_before": "teach-predicted", "teach": "teach-taken", "watch_before": "watch-before",
    "watch": "watch-after",
}  # fmt: skip
TEACH = f"""
get_ipython().reset(new_session=False)
import warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from aoi_ssl.data import load_folder
from aoi_ssl.encoder import Encoder
from aoi_ssl.teach import teach
images = load_folder({str(WORK / "teach")!r})["new"]
images = images.select([row for row, device in enumerate(images["device"]) if device == "d003"])
handle = teach(images, Encoder.from_pretrained("aoi-mae-small"), out="masks")
handle.learn().calibrate().go(1)
"""


def middle(counts) -> str:
    "The image in the middle, by what the aligned encoder scores under full drift."
    from aoi_ssl.metrics import mean_iou

    mine = counts[(counts["encoder"] == "MAE") & (counts["method"] == "aligned") & (counts["test"] == "drift 1")]
    scores = mean_iou(mine, by=("stem",)).sort_values(kind="stable")
    return scores.index[len(scores) // 2]


def new_device(out: Path) -> None:
    "The image, the truth and the masks of three methods, as on the page of the report."
    import pandas as pd
    import torch

    from aoi_ssl import benchmark, show
    from aoi_ssl.data import few_shot
    from aoi_ssl.encoder import Encoder
    from aoi_ssl.predict import to_mask
    from aoi_ssl.retrieval import build_bank

    torch.set_num_threads(1)
    stem = middle(pd.read_csv(ROOT / "nbs/experiments/results/retrieval/report.csv"))
    data = benchmark.arena(WORK / "arena", devices=8, images=7, seed=40, drifts=(0.0, 1.0))
    own = next(images for images in benchmark.by_device(data["new devices"]).values() if stem in list(images["stem"]))
    item, mae = data["drift 1"][list(data["drift 1"]["stem"]).index(stem)], Encoder.from_pretrained("aoi-mae-small")
    pixels = benchmark.rivals(mae)["raw pixels"]
    rows = {"the paper's retrieval": (mae, {"method": "paper"}), "aligned, raw pixels": (pixels, benchmark.VARIANCE)}
    rows["aligned, encoder"] = mae, {"method": "aligned"}
    masks, (labelled, _) = {"truth": item["mask"]}, few_shot(own, 3, seed=0)
    for name, (encoder, options) in rows.items():
        bank = build_bank(labelled, encoder, **options)
        masks[name] = to_mask(bank.predict(item["image"][None])[0], bank.thresholds)
    show.compare(item["image"], masks, bank.classes, columns=5, stretch=True, width=11).savefig(out / "new_device.png", dpi=100)
    print(f"new_device.png is {stem}")


def teach_scene(bench: Callable) -> None:
    "One labelled image of four; what is predicted for the next one, and that accepted."
    from aoi_ssl.synthetic import render_folder

    render_folder(WORK / "teach", devices=0, new_devices=4, images=4, calibration=0, seed=0, progress=False)
    for mask in (WORK / "teach" / "dynamo" / "d003" / "masks").glob("*"):
        if not mask.name.startswith("im000"):
            mask.unlink()
    b = bench("teach-pictures.ipynb", TEACH, "handle.accept(); None", height=1000)
    for cell, name in enumerate(("teach-predicted", "teach-taken")):
        b.run(cell)
        b.widget()
        b.page.mouse.move(5, 5)
        b.page.wait_for_function("() => document.querySelector('.jp-Notebook .aoi').parentElement.aoi.pending.size === 0")
        b.page.wait_for_timeout(1000)
        b.shoot(name)


@contextmanager
def jupyterlab(home: Path) -> Iterator[Callable]:
    "What the tests of the widgets are given: opens a notebook of some cells."
    from in_browser import CHROMIUM, FLAGS, Visit, serve
    from playwright.sync_api import sync_playwright
    from test_browser_widgets import Bench

    kernels = {}
    with serve("jupyterlab", home) as url, sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=60_000)

        def bench(name: str, *cells: str, width: int = 1280, height: int = 900) -> Bench:
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(120_000)
            return Bench(Visit(page), "lab", url, name, kernels, *cells)

        yield bench
        chromium.close()


def widgets(out: Path) -> None:
    "Play the scenes, and keep what was photographed."
    sys.path.insert(0, str(ROOT / "tests"))
    import test_browser_widgets as scenes
    from in_browser import SHOTS

    home = Path(tempfile.gettempdir()) / "aoi_images"  # a path that is seen in the pictures
    shutil.rmtree(home, ignore_errors=True)
    with jupyterlab(home) as bench:
        for play in (scenes.test_explore, scenes.test_inspect, scenes.test_inspect_tells_what_is_new, teach_scene, scenes.test_watch):
            play(bench)
    for name, shot in PICTURES.items():
        few = Image.open(SHOTS / f"widget-{shot}.png").convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(out / f"widget_{name}.png", optimize=True)
        print(f"widget_{name}.png: {few.size[0]} x {few.size[1]}")


def main() -> None:
    "Make all of them, or some."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("new_device", "widgets"), help="only this")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    shutil.rmtree(WORK, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for make in (new_device, widgets):
        if args.what in (None, make.__name__):
            make(args.out)


if __name__ == "__main__":
    main()
