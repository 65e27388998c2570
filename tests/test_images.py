"The pictures that no notebook draws: each is made by tools/make_images.py, from a scene that there is."

import pandas as pd
import pytest
from from_tools import ROOT, TOOLS, load_tool, needs_tools
from PIL import Image

pytestmark = needs_tools


@pytest.fixture(scope="module")
def tool():
    return load_tool("make_images")


def test_every_picture_is_made(tool):
    there = {path.stem for path in tool.IMAGES.glob("*.png")}
    assert there == {"new_device", *(f"widget_{name}" for name in tool.PICTURES)}, "a picture that nothing makes, or one that was not made"
    scenes = (TOOLS / "make_images.py").read_text() + (ROOT / "tests" / "test_browser_widgets.py").read_text()
    for shot in tool.PICTURES.values():
        assert scenes.count(f'"{shot}"') == 2, f"no scene takes {shot}"  # besides the table of pictures


def test_pictures_of_one_page_have_one_width(tool):
    assert {Image.open(path).width for path in tool.IMAGES.glob("widget_*.png")} == {848}


def test_the_new_device_is_neither_the_best_nor_the_worst(tool):
    row = {"encoder": "MAE", "method": "aligned", "test": "drift 1", "class": "wire", "fp": 0, "device": "d"}
    counts = pd.DataFrame([row | {"stem": f"i{n}", "tp": n, "fn": 9 - n} for n in (7, 1, 3, 9, 5)])
    other = row | {"stem": "i1", "tp": 9, "fn": 0}
    others = pd.DataFrame([other | {"test": "drift 0.5"}, other | {"encoder": "raw pixels"}])
    assert tool.middle(pd.concat([counts, others])) == "i5"
