"Widgets without a browser: traits, messages of the page, errors, results, and the JavaScript as a module."

import io
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from aoi_ssl import show, widgets
from aoi_ssl.core import AoiError
from aoi_ssl.encoder import PixelEncoder, ViTEncoder, mae_config, new_vit
from aoi_ssl.explore import Explorer, explore
from aoi_ssl.inspect import inspect, threshold_curves
from aoi_ssl.metrics import binary_counts
from aoi_ssl.novelty import calibrate_novelty
from aoi_ssl.predict import Segmenter
from aoi_ssl.pretrain import Pretrained
from aoi_ssl.remember import remember_image
from aoi_ssl.retrieval import MemoryBank, empty_bank
from aoi_ssl.similar import bank_grid
from aoi_ssl.teach import teach
from aoi_ssl.watch import chart_series, watch
from aoi_ssl.widgets import bank_mask

CLASSES = ["wire", "ball", "wedge", "epoxy"]
WIDGETS = ["explore", "inspect", "teach", "watch"]


@pytest.fixture(scope="module")
def scene():
    "Two images of patches of four kinds, and their masks: kind k is class k."
    rng = np.random.default_rng(0)
    kinds = rng.random((4, 2, 8, 8), dtype=np.float32)
    maps = rng.integers(0, 4, (2, 6, 8))
    images = [torch.from_numpy(np.block([[[kinds[k, c] for k in row] for row in m] for c in (0, 1)])) for m in maps]
    images = [i if i.ndim == 3 else i.reshape(2, 48, 64) for i in images]
    masks = [torch.from_numpy(np.stack([np.kron(m == k, np.ones((8, 8), bool)) for k in range(4)])) for m in maps]
    return images, masks, maps


@pytest.fixture(scope="module")
def encoder():
    return PixelEncoder(channels=2, patch_size=8)


@pytest.fixture(scope="module")
def bank(scene, encoder):
    images, masks, _ = scene
    item = {"image": images[1], "mask": masks[1], "ignore": None}
    record = {"stem": "b_01", "device": "d1", "height": 48, "width": 64, "classes": CLASSES}
    return MemoryBank(encoder, CLASSES, remember_image(item, encoder), [record])


def from_page(handle, **state):
    "Change traits as the page does."
    handle.set_state(state)


# the page's half


@pytest.mark.parametrize("name", WIDGETS)
def test_the_page_is_one_module_that_asks_nobody(name):
    text = widgets.page_module(name)
    assert not re.search(r"^\s*(import|export (?!default))", text, re.M)
    assert text.count("export default") == 1
    assert "fetch(" not in text and "XMLHttpRequest" not in text and "import(" not in text
    assert re.findall(r"https?://[^\"\s)]+", text + widgets.page_style()) == ["http://www.w3.org/2000/svg"]


@pytest.mark.skipif(not shutil.which("node"), reason="no node on PATH")
@pytest.mark.parametrize("name", WIDGETS)
def test_the_page_is_sound_javascript(name):
    command = ["node", "--check", "--input-type=module"]
    done = subprocess.run(command, input=widgets.page_module(name), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# pictures


def test_tiles_put_together_are_the_picture():
    image = torch.rand(2, 700, 1100, generator=torch.Generator().manual_seed(0))
    extra = np.zeros((2, 700, 1100), np.uint8)
    extra[1, 333] = 255
    planes = widgets.Planes(image, extra=extra)
    assert planes.meta()["level"] == 1 and planes.meta()["planes"] == 4

    def read(files):
        return np.concatenate([np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in files])[:4]

    whole = np.concatenate([np.concatenate([read(planes.tile(0, r, c)) for c in range(3)], 2) for r in range(2)], 1)
    assert (whole == planes.data).all()
    small = read(planes.overview())
    assert small.shape == (4, 350, 550)
    assert (small[3, 166] == 255).all() and (np.delete(small[3], 166, 0) == 0).all()  # a thin line is not lost
    assert abs(small[0].mean() - planes.data[0].mean()) < 0.5
    assert (widgets.Planes(image).data[0] / 255 * planes.white + planes.black * 0 - image[0].numpy()).max() < 0.01


def test_false_colour_is_that_of_show():
    image = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = np.array(widgets.Planes(image).meta()["colours"])
    assert np.allclose(np.einsum("chw,cr->hwr", image, weights), show.false_colour(image), atol=1e-6)


# explore


def test_what_is_held_and_what_is_similar(scene, encoder):
    images, _, maps = scene
    handle = explore(images[0], encoder, others=[images[1]])
    assert handle.similarity is None and handle.query is None and handle.similarities == []
    handle.hold(0, 0)
    assert handle.held == [{"image": 0, "row": 0, "column": 0, "minus": False}]
    for found, kinds in zip(handle.similarities, maps, strict=True):  # patches of one kind are the same
        assert ((found > 0.9999) == (kinds == maps[0][0, 0])).all()
    from_page(handle, held=[{"image": 1, "row": 2, "column": 3, "minus": False}])
    assert ((handle.similarity > 0.9999) == (maps[0] == maps[1][2, 3])).all()


def test_held_patches_are_averaged_and_subtracted(scene, encoder):
    images, _, maps = scene
    handle = explore(images[0], encoder)
    a, b = (np.argwhere(maps[0] == k)[0] for k in (0, 1))
    handle.hold(*(a * 8)).hold(*(b * 8), add=True)
    grid = handle.embeddings[0]
    mean = torch.nn.functional.normalize(grid[tuple(a)] + grid[tuple(b)], dim=-1)
    assert np.allclose(handle.similarity, (grid @ mean).numpy(), atol=1e-6)
    handle.hold(*(a * 8)).hold(*(b * 8), minus=True)
    less = torch.nn.functional.normalize(grid[tuple(a)] - grid[tuple(b)], dim=-1)
    assert np.allclose(handle.similarity, (grid @ less).numpy(), atol=1e-6)


def test_the_page_gets_the_same_embeddings(scene, encoder):
    handle = explore(scene[0][0], encoder, space="whitened")
    grid, sent = handle.embeddings[0], handle.grids[0]
    numbers = np.frombuffer(handle.packed[0], np.int8).reshape(sent["rows"], sent["columns"], sent["dim"])
    again = numbers * np.frombuffer(handle.packed_scales[0], np.float32).reshape(sent["rows"], sent["columns"], 1)
    assert np.abs(again - grid.numpy()).max() < 0.01 and sent["patch"] == 8


def test_neighbours_come_from_the_bank(scene, encoder, bank):
    images, _, maps = scene
    handle = explore(images[0], encoder, bank, bank_images={"b_01": images[1]}, k=3)
    assert handle.near == [] and "Hold" in handle.bank_note
    handle.hold(0, 0)
    table = handle.neighbours
    assert isinstance(table, pd.DataFrame) and len(table) == 3
    assert (table.similarity > 0.9999).all() and set(table.stem) == {"b_01"}
    assert all(maps[1][r.row, r.column] == maps[0][0, 0] for r in table.itertuples())
    assert [n["key"] for n in handle.near] == table.key.tolist() and len(handle.thumbs) == 3
    assert handle.near[0]["labels"] == CLASSES[maps[0][0, 0]]
    handle.space = "whitened"
    assert (handle.neighbours.similarity > 0.999).all()


def test_a_bank_of_another_encoder_is_refused(scene, encoder, bank):
    "Its keys would be compared with embeddings that mean something else."
    for look in (explore, show.explore):
        with pytest.raises(AoiError, match="built with"):
            look(scene[0][0], ViTEncoder("nano", patch_size=8), bank, held=[(0, 0)])
        with pytest.raises(AoiError, match="aoi-mae-tiny.*from_pretrained"):
            look(scene[0][0], "aoi-mae-tiny")
        with pytest.raises(AoiError, match=r"held has 0; pixels \(y, x\)"):
            look(scene[0][0], encoder, held=(0, 0))


def test_teach_refuses_the_bank_of_another_encoder(scene, bank):
    with pytest.raises(AoiError, match="built with"):
        teach({"a": scene[0][0]}, ViTEncoder("nano", patch_size=8), bank, journal=None)


def test_an_empty_bank_says_so(scene, encoder):
    "In the widget as in its twin nothing is searched, and the rest is shown."
    empty = empty_bank({"a": scene[0][0]}, encoder, CLASSES, method="paper")
    handle = explore(scene[0][0], encoder, empty, held=[(0, 0)])
    assert handle.near == [] and "bank.add" in handle.bank_note
    assert handle.picture()._repr_png_() == show.explore(scene[0][0], encoder, empty, held=[(0, 0)])._repr_png_()


def test_a_bank_that_keeps_its_lights_shows_them(folder):
    "Nothing has to be passed beside the bank; what is passed comes first."
    from aoi_ssl.data import load_folder
    from aoi_ssl.retrieval import build_bank

    new = load_folder(folder)["new"]
    bank = build_bank(new.select([0]), PixelEncoder(channels=2), refine=1, calibrate=False)
    stem, image = new["stem"][0], new[0]["image"].numpy()
    assert np.allclose(show.bank_image(bank, None, stem), image)
    assert (show.bank_image(bank, {stem: torch.zeros(2, 256, 256)}, stem) == 0).all()
    assert show.bank_image(bank.using(refine=0), None, "another") is None


def test_a_neighbour_is_shown_in_its_place(scene, encoder, bank):
    images, masks, _ = scene
    handle = explore(images[0], encoder, bank, bank_images={"b_01": images[1]}, held=[(0, 0)])
    handle._handle_custom_msg({"kind": "place", "key": handle.near[0]["key"]}, [])
    assert handle.error == "" and handle.place["stem"] == "b_01" and handle.place["side"] == 8
    assert (bank_mask(bank, "b_01") == masks[1].numpy()).all()
    assert (handle._planes["place_0"].data[2:] == masks[1].numpy() * 255).all()


def test_layers_of_a_vit(scene):
    vit = ViTEncoder("nano", patch_size=8)
    handle = explore(scene[0][0], vit, held=[(0, 0)])
    assert handle.layers == [None, 1, 2]
    last = handle.similarity
    handle.layer = 1
    assert not np.allclose(handle.similarity, last)
    handle.layer = 2
    assert np.allclose(handle.similarity, last, atol=1e-6)
    with pytest.raises(AoiError, match="7"):
        handle.layer = 7
    assert handle.layer == 2


def test_errors_of_the_page_are_shown_and_the_state_holds(scene, encoder):
    handle = explore(scene[0][0], encoder, held=[(0, 0)])
    from_page(handle, held=[{"image": 0, "row": 99, "column": 0, "minus": False}])
    assert "99" in handle.error and handle.held[0]["row"] == 0
    handle.error = ""
    from_page(handle, light=5, opacity=0.5)
    assert "light=5" in handle.error and handle.light == 0
    handle.error = ""
    handle._handle_custom_msg({"kind": "place", "key": 12345}, [])
    assert handle.error
    with pytest.raises(AoiError, match="bank"):
        handle.neighbours  # noqa: B018
    with pytest.raises(AoiError, match="outside"):
        handle.held = [(48, 0)]


def test_explore_and_its_twin_draw_the_same(scene, encoder, bank):
    images = scene[0]
    options = {
        "others": [images[1]],
        "held": [(8, 8), (20, 20)],
        "bank_images": {"b_01": images[1]},
        "colours": "cividis",
    }
    handle = explore(images[0], encoder, bank, **options)
    live, still = handle.picture(), show.explore(images[0], encoder, bank, **options)
    pixels = [np.asarray(Image.open(io.BytesIO(f._repr_png_())).convert("RGB")).astype(int) for f in (live, still)]
    assert pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() < 0.5
    for overlay in ("pca", "none"):
        handle.overlay = overlay
        assert handle.picture().alt
    assert isinstance(handle, Explorer)


# inspect


class Mute(Segmenter):
    "Gives the probabilities that it was made with."

    kind = "mute"

    def __init__(self, probabilities):
        super().__init__(CLASSES, 2)
        self.probabilities = probabilities

    def predict(self, images):
        return self.probabilities.expand(len(images), *self.probabilities.shape)


class Known(Mute):
    "Also says what is novel."

    kind = "known"

    def novelty(self, image):
        return self.probabilities[0]


@pytest.fixture
def segmenters(scene):
    generator = torch.Generator().manual_seed(0)
    truth = scene[1][0].float()
    return {
        n: Known((truth * 0.5 + a * torch.rand(truth.shape, generator=generator)).clamp(0, 1))
        for n, a in (("a", 0.4), ("b", 0.5))
    }


def test_thresholds_are_shown_as_they_were_chosen(scene, segmenters):
    "Single precision holds 0.36000001430511475; nobody chose that."
    segmenters["a"].thresholds[:] = 0.36
    assert inspect(scene[0][0], segmenters).thresholds == [[0.36] * 4, [0.5] * 4]


def test_scores_follow_the_thresholds_exactly(scene, segmenters):
    images, masks, _ = scene
    ignore = torch.zeros_like(masks[0])
    ignore[:, :10] = True
    handle = inspect(images[0], segmenters, masks[0], ignore=ignore)
    handle.set_threshold("ball", 0.37).set_threshold("epoxy", 0.61, segmenter="b")
    assert handle.thresholds == [[0.5, 0.37, 0.5, 0.5], [0.5, 0.37, 0.5, 0.61]]
    for s, (name, segmenter) in enumerate(segmenters.items()):
        mask = segmenter.probabilities > torch.tensor(handle.thresholds[s])[:, None, None]
        assert (handle.masks[name] == mask.numpy()).all()
        tp, fp, fn = binary_counts(mask, masks[0], ignore).double().T
        table = handle.scores[handle.scores.segmenter == name]
        assert np.allclose(table.iou, tp / (tp + fp + fn))
        for k, t in enumerate(handle.thresholds[s]):  # what the page reads from the curve
            assert abs(handle.curves[s][k]["iou"][round(100 * t)] - (tp / (tp + fp + fn))[k]) < 1e-4


def test_the_page_gets_probabilities_truth_and_novelty(scene, segmenters):
    images, masks, _ = scene
    handle = inspect(images[0], segmenters, masks[0])
    data = handle._planes["0"].data
    assert data.shape == (2 + 4 + 4 + 4 + 4 + 2, 48, 64)
    assert np.abs(data[2:6] / 255 - segmenters["a"].probabilities.numpy()).max() <= 0.5 / 255 + 1e-6
    assert (data[10:14] == masks[0].numpy() * 255).all() and not data[14:18].any()
    assert handle.has_novelty and data[18:].min() == 0 and data[18:].max() == 255


def test_why_a_pixel(scene, bank, segmenters):
    images, masks, maps = scene
    handle = inspect(images[0], {"bank": bank}, masks[0], bank_images={"b_01": images[1]})
    table = handle.ask(12, 20)
    kind = maps[0][1, 2]
    assert table.loc[table.predicted, "class"].tolist() == [CLASSES[kind]] == table.loc[table.truth, "class"].tolist()
    assert len(handle.near) == 5 and all(n["labels"] == CLASSES[kind] for n in handle.near)
    handle.pixel = None
    assert handle.why == [] and handle.near == []
    from_page(handle, pixel={"y": 99, "x": 0})
    assert "99" in handle.error and handle.pixel is None
    assert inspect(images[0], segmenters["a"], masks[0]).ask(1, 1) is not None  # no bank, no neighbours


def test_inspect_says_what_does_not_fit(scene, segmenters):
    images, masks, _ = scene
    with pytest.raises(AoiError, match="truth"):
        inspect(images[0], segmenters["a"]).scores  # noqa: B018
    with pytest.raises(AoiError, match="truth has 2 layers"):
        inspect(images[0], segmenters["a"], masks[0][:2])
    handle = inspect(images[0], segmenters["a"])
    with pytest.raises(AoiError, match="numbers from 0"):
        handle.thresholds = [[0.5]]
    with pytest.raises(AoiError, match="wedge"):
        handle.set_threshold("tape", 0.5)
    handle._handle_custom_msg({"kind": "apply"}, [])
    assert handle.error == ""


WRONG = {
    "no segmenters": ({"segmenters": [1, 2]}, "no segmenter"),
    "a path": ({"segmenters": "runs/bank"}, "Segmenter.load"),
    "errors without a truth": ({"overlay": "errors"}, "needs a truth"),
    "no overlay": ({"overlay": "heat"}, "heat"),
    "no class": ({"shown": ["wires"]}, "wires.*wire"),
    "a name for a list": ({"shown": "wire"}, "shown='wire'"),
    "too few": ({"shown": [True]}, "shown="),
    "no such segmenter": ({"thresholds": {"nope": [0.5] * 4}}, "nope.*'a'"),
    "too few thresholds": ({"thresholds": {"a": [0.5]}}, "4 numbers"),
    "no number": ({"thresholds": {"a": "high"}}, "4 numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_inspect_and_its_twin_refuse_the_same(scene, segmenters, case):
    options, match = WRONG[case]
    for look in (inspect, show.inspect):
        with pytest.raises(AoiError, match=match):
            look(scene[0][0], **{"segmenters": {"a": segmenters["a"]}} | options)


def test_traits_of_inspect_take_names_and_refuse_what_there_is_not(scene, segmenters):
    "Set in Python or by the page; the old value stays."
    handle = inspect(scene[0][0], segmenters)
    handle.shown = ["wire"]
    assert handle.shown == [True, False, False, False]
    handle.thresholds = {"b": [0.1, 0.2, 0.3, 0.4]}
    assert handle.thresholds == [[0.5] * 4, [0.1, 0.2, 0.3, 0.4]]
    handle.shown = None
    assert handle.shown == [True] * 4
    wrong = [("overlay", "errors"), ("focus", 9), ("focus", -1), ("shown", [True]), ("shown", ["tape"]), ("thresholds", {"c": [0.5] * 4})]
    for name, value in wrong:
        before = getattr(handle, name)
        with pytest.raises(AoiError, match=name):
            setattr(handle, name, value)
        handle.error = ""
        from_page(handle, **{name: value})
        assert name in handle.error and getattr(handle, name) == before


def test_a_threshold_asks_no_bank_and_leaves_the_place(scene, bank, segmenters, monkeypatch):
    images, masks, _ = scene
    handle = inspect(images[0], {"one": bank, "a": segmenters["a"], "two": bank}, masks[0], bank_images={"b_01": images[1]})
    asked = []
    neighbours = type(bank).neighbours
    monkeypatch.setattr(type(bank), "neighbours", lambda self, *args, **options: asked.append(args) or neighbours(self, *args, **options))
    handle.ask(12, 20)
    assert len(asked) == 2 and [n["bank"] for n in handle.near] == ["one"] * 5 + ["two"] * 5 and len(handle.thumbs) == 10
    handle._handle_custom_msg({"kind": "place", "key": handle.near[7]["key"], "bank": "two"}, [])
    assert handle.error == "" and handle.place["bank"] == "two" and handle.place["key"] == handle.near[7]["key"]
    before = handle.why
    handle.set_threshold("wire", 0.9)
    assert len(asked) == 2 and handle.place["bank"] == "two" and handle.why != before
    handle.light = 1
    assert len(asked) == 4 and handle.place["bank"] == "two"
    handle.ask(1, 1)
    assert handle.place is None


def test_a_row_brings_its_truth_to_the_twin(scene, segmenters):
    images, masks, _ = scene
    row = {"image": images[0], "mask": masks[0], "ignore": None, "stem": "a_00"}
    handle = inspect(row, segmenters, overlay="errors")
    assert handle.picture()._repr_png_() == show.inspect(row, segmenters, overlay="errors", bank_images={})._repr_png_()


def test_thresholds_are_applied_only_when_asked(scene, segmenters):
    handle = inspect(scene[0][0], segmenters, thresholds={"a": [0.1, 0.2, 0.3, 0.4]})
    assert segmenters["a"].thresholds.tolist() == [0.5] * 4
    handle.apply()
    assert np.allclose(segmenters["a"].thresholds.tolist(), [0.1, 0.2, 0.3, 0.4])


def test_a_bank_says_what_is_new_once_it_is_calibrated(scene, bank, segmenters):
    images, bank = scene[0], bank.subset(calibrate=False)
    with pytest.raises(AoiError, match="calibrate_novelty"):
        inspect(images[0], bank, overlay="novelty")
    with pytest.raises(AoiError, match="calibrate_novelty"):
        show.inspect(images[0], bank, overlay="novelty")
    handle = inspect(images[0], bank)
    assert not handle.has_novelty and "calibrate_novelty" in handle.novelty_notes[0] and "novelty" not in handle.ask(1, 1)
    calibrate_novelty(bank, [image + 0.05 * torch.rand(image.shape, generator=torch.Generator().manual_seed(n)) * (1 - image)
                             for n, image in enumerate(images)])
    odd = images[0].clone()
    odd[:, :16, :16] = odd[:, :16, :16].flip(0)
    handle = inspect(odd, {"bank": bank, "other": segmenters["a"]}, overlay="novelty")
    found = handle.novelty.maps["bank"]
    assert handle.novelty.label == "novelty" and handle.novelty_notes[0] == bank.novelty.note(torch.from_numpy(found))
    alone = inspect(odd, {"bank": bank, "none": Mute(segmenters["a"].probabilities)}, overlay="novelty")
    assert alone.novelty_limits[0] == 0 and alone.novelty_limits[1] >= 2 and alone.novelty.label == "novelty, 1: the limit"
    assert list(alone.novelty.maps) == ["bank"] and not alone._planes["0"].data[-1].any()  # one panel cannot say
    assert alone.ask(4, 4).set_index("segmenter").loc["bank", "novelty"].iloc[0] == pytest.approx(float(found[4, 4]))
    twin = show.inspect(odd, {"bank": bank, "none": Mute(segmenters["a"].probabilities)}, overlay="novelty")
    assert alone.picture().alt == twin.alt and "trusted" in twin.alt
    assert alone.picture()._repr_png_() == twin._repr_png_()


def test_inspect_and_its_twin_draw_the_same(scene, segmenters):
    images, masks, _ = scene
    for overlay in ("mask", "errors", "probability", "novelty", "none"):
        handle = inspect(images[0], segmenters, masks[0], overlay=overlay, shown=["wire", "ball"])
        twin = show.inspect(images[0], segmenters, masks[0], overlay=overlay, shown=["wire", "ball"])
        assert handle.picture().alt == twin.alt
        assert handle.picture()._repr_png_() == twin._repr_png_()


def test_curves_of_a_hand_computed_case():
    p = torch.tensor([[[0.2, 0.4, 0.6, 0.8]]])
    found = threshold_curves(
        p, torch.tensor([[[False, True, True, True]]]), torch.tensor([[[False, False, False, True]]])
    )[0]
    assert (
        found["iou"][10] == round(2 / 3, 4)
        and found["iou"][30] == 1
        and found["iou"][50] == 0.5
        and found["recall"][70] == 0
    )


# watch


@pytest.fixture(scope="module")
def trained():
    from transformers import ViTMAEForPreTraining

    mae = new_vit(mae_config("nano", patch_size=8, image_size=32), model=ViTMAEForPreTraining).eval()
    history = pd.DataFrame({"step": range(50), "seconds": np.arange(50.0), "lr": 1e-3, "loss": np.linspace(1, 0.5, 50)})
    return Pretrained(ViTEncoder(mae.vit), mae, history)


def test_a_run_that_has_ended_is_not_read_again(scene, trained, tmp_path):
    "Beside one that goes on; there is no news until that one has some."
    handle = watch({"done": trained, "soon": tmp_path / "soon"}, scene[0][0][:, :32])
    before = handle.runs["done"]
    assert handle.live and not handle.poll() and handle.runs["done"] is before


def test_a_run_is_rebuilt_at_any_mask_ratio(scene, trained):
    image = scene[0][0][:, :32]  # two windows of pre-training
    handle = watch(trained, image, held=(9, 17), mask_ratio=0.25)
    assert handle.rebuilt.hidden.float().mean() == 0.25 and handle.snapshots == ["untrained", "end"]
    assert [s["name"] for s in handle.sources] == ["image", "seen", "rebuilt"]
    from_page(handle, mask_ratio=0.75)
    assert handle.rebuilt.hidden.float().mean() == 0.75
    expected = trained.reconstruct(image[None], 0.75, seed=0).rebuilt
    assert torch.equal(handle.rebuilt.rebuilt, expected)
    from_page(handle, seed=1)
    assert not torch.equal(handle.rebuilt.rebuilt, expected)
    grid = trained.encoder.encode(image[None])[0]
    found = show.similarity_map(grid, grid[1, 2]).numpy()
    assert np.allclose(handle.similarities["end"], found, atol=1e-6) and found[1, 2] > 0.9999
    low, high = handle.limits[1]
    assert [low, high] == list(show.scale_limits([found], [{"image": 0, "row": 1, "column": 2}])) and high < found.max()
    sent = np.frombuffer(handle.maps[1], np.uint8).reshape(4, 8) / 255
    assert np.abs(sent - ((found - low) / (high - low)).clip(0, 1)).max() < 0.003
    assert handle.picture().alt and "50 steps" in handle.status
    from_page(handle, held=[99, 0])
    assert "99" in handle.error and handle.held == [9, 17]


def test_a_live_run_is_followed_to_its_end(folder, tmp_path):
    "A checkpoint beside the folder, then the folder: what is on the page goes on."
    from aoi_ssl.data import load_folder
    from aoi_ssl.pretrain import pretrain
    from aoi_ssl.train import _Run, forget_unfinished, journal_beside

    dataset = load_folder(folder)["pretrain"].select([0, 1])
    handle = watch(tmp_path / "mae", dataset[0]["image"], held=(1, 1))  # before there is anything
    assert handle.live and "waiting" in handle.status and handle.similarities == {} and not handle.has_rebuilt
    assert handle.picture().alt and not handle.poll()
    options = {"encoder": "nano", "crop": 64, "batch_size": 2, "progress": False, "augment": False}
    done = pretrain(dataset, tmp_path / "mae", budget="6 steps", **options)
    (tmp_path / "mae").rename(tmp_path / "later")
    journal_beside(tmp_path / "mae.checkpoint").write_text("".join(done.history.head(2).to_json(orient="records", lines=True)) + '{"st')
    assert handle.poll() and len(handle.history) == 2 and "running" in handle.status  # no checkpoint yet
    journal_beside(tmp_path / "mae.checkpoint").unlink()
    run = _Run({"config": done.mae.config.to_json_string()}, step=3, history=done.history.head(3).to_dict("records"))
    shutil.copytree(tmp_path / "later" / "snapshots", tmp_path / "mae.snapshots")
    run.save(tmp_path / "mae.checkpoint", done.mae, torch.optim.SGD(done.mae.parameters(), lr=0.1))
    assert handle.poll() and handle.live and len(handle.history) == 3 and handle.rebuilt is not None and handle.has_rebuilt
    assert handle.snapshots == ["start", "step 1", "step 2", "step 3"] and len(handle.maps) == 4
    assert torch.allclose(handle.encoders["step 3"].encode(dataset[0]["image"][None]), done.encoder.encode(dataset[0]["image"][None]))
    assert not handle.poll()
    (tmp_path / "later").rename(tmp_path / "mae")
    forget_unfinished(tmp_path / "mae.checkpoint")
    handle._handle_custom_msg({"kind": "poll"}, [])
    assert handle.error == "" and not handle.live and len(handle.history) == 6 and len(handle.series[0]["x"]) == 6
    assert handle.snapshots == ["start", "step 1", "step 2", "step 3", "end"]
    still = show.watch(tmp_path / "mae", dataset[0], held=(1, 1), every=1.0)
    assert still._repr_png_() == handle.picture()._repr_png_()


def test_fine_tuning_is_followed_over_time(folder, tmp_path):
    "As an object and as a folder; without snapshots the encoder as it is."
    from aoi_ssl.data import load_folder
    from aoi_ssl.segment import finetune

    dataset = load_folder(folder)["new"].select([0, 1])
    encoder = ViTEncoder("nano", image_size=64)
    options = {"budget": "4 steps", "crop": 64, "batch_size": 2, "hidden": 16, "progress": False}
    model = finetune(dataset, encoder, tmp_path / "seg", **options)
    for run in (model, tmp_path / "seg", str(tmp_path / "seg")):
        handle = watch(run, dataset[0], held=(10, 10))
        assert handle.snapshots == ["start", "step 1", "step 2", "step 3", "end"] and len(handle.maps) == 5
        start = encoder.encode(dataset[0]["image"][None])
        assert torch.allclose(handle.encoders["start"].encode(dataset[0]["image"][None]), start)
        assert not np.allclose(handle.similarities["start"], handle.similarities["end"])
    assert watch(finetune(dataset, encoder, snapshots=False, **options), dataset[0], held=(10, 10)).snapshots == ["untrained", "end"]
    assert list(finetune(dataset, encoder, **options).snapshots.steps) == [0, 1, 2, 3]  # without a folder: in memory


@pytest.mark.parametrize("run", [None, {}, 3, "no/such/place"])
def test_watch_says_what_is_no_run(run):
    for look in (watch, show.watch):
        with pytest.raises(AoiError, match="expected|no run"):
            look(run)


def test_what_is_held_is_a_pixel(scene, trained):
    for held in ((999, 0), (1,), (1, 2, 3), "ab"):
        for look in (watch, show.watch):
            with pytest.raises(AoiError, match="held="):
                look(trained, scene[0][0], held=held)
    with pytest.raises(AoiError, match="held="):
        watch(trained, held=(1, 1))
    handle = watch(trained.history, scene[0][0], held=(1, 1))  # a history has no encoder
    assert handle.similarities == {} and handle.held == [1, 1] and handle.picture().alt


def test_several_runs_and_histories_alone(trained):
    handle = watch({"a": trained, "b": trained.history.head(20)})
    assert [s["label"] for s in handle.series] == ["a loss", "b loss"] and not handle.has_rebuilt
    assert set(handle.history) == {"a", "b"} and handle.picture().alt.startswith("Curves")
    assert chart_series({"": pd.DataFrame({"step": [0, 1], "loss": [np.nan, np.nan]})}) == []


def test_watch_and_its_twin_draw_the_same(scene, trained):
    snapshots = {"one": trained.encoder}
    options = {"snapshots": snapshots, "held": (9, 17), "mask_ratio": 0.5}
    assert (
        watch(trained, scene[0][0], **options).picture()._repr_png_()
        == show.watch(trained, scene[0][0], **options)._repr_png_()
    )


def test_widgets_with_a_bank_that_turns_shifts_and_whitens(folder):
    "The aligned method, with patches turned as well: masks lie right, neighbours are found, strokes are learned."
    from aoi_ssl.data import load_folder
    from aoi_ssl.retrieval import build_bank

    new = load_folder(folder)["new"]
    known, asked = new.select([0]), new[1]
    options = {"bank_shifts": 4, "query_shifts": 1, "turns": 8, "calibrate": False}
    bank = build_bank(known, PixelEncoder(channels=2), method="aligned", **options)
    assert (bank_mask(bank, known["stem"][0]) == known[0]["mask"].numpy()).all()
    row = bank.turn.argmax().item()
    y, x = bank.y[row].item(), bank.x[row].item()
    upright = show.upright_masks(bank, [row])[0]
    truth = np.pad(known[0]["mask"].numpy(), ((0, 0), (16, 16), (16, 16)))
    assert bank.turn[row] > 0 and (upright == truth[:, y + 16:y + 32, x + 16:x + 32]).all()
    handle = explore(asked, bank.encoder, bank, bank_images=known, held=[(128, 128)], k=4)
    assert len(handle.near) == 4 and "own space" in handle.bank_note
    one = bank.neighbours(asked["image"], 128, 128, k=4)
    assert handle.neighbours.key.tolist() == one.key.tolist()
    handle.hold(40, 40, add=True)
    both = bank.keys.float() @ torch.nn.functional.normalize(sum(bank_grid(bank, asked["image"])[p] for p in ((8, 8), (2, 2))), dim=0)
    assert handle.neighbours.similarity.tolist() == pytest.approx(both.topk(4).values.tolist(), abs=1e-3)
    handle.hold(40, 40, minus=True)
    assert len(handle.near) == 4 and "less row 2" in handle.picture().alt
    judged = inspect(asked, bank, bank_images=known)
    judged.ask(128, 128)
    assert judged.near and judged.error == ""
    before = len(bank.keys)
    taught = teach({"a": asked["image"]}, bank.encoder, bank, journal=None)
    taught.paint("wire", "line", [(10, 10), (100, 60)], size=4)
    assert len(bank.keys) > before and taught.prediction.shape == (4, 256, 256)
    assert len(taught.undo().bank.keys) == before


@pytest.mark.parametrize("verb", [explore, teach, inspect, watch])
def test_a_twin_takes_the_arguments_of_its_widget(verb):
    "In the same order, with the same defaults; only the width of the figure is its own, and the labels of one that nobody painted."
    from inspect import signature

    own, twin = (signature(f).parameters for f in (verb, getattr(show, verb.__name__)))
    shared = {n: p.default for n, p in twin.items() if n not in ("width", "labels")}
    assert list(shared) == list(own) and shared == {n: p.default for n, p in own.items()}
