"Labelling with a bank that learns along: strokes, the journal, thresholds of the bank and of the hand, what the page is told."
# ruff: noqa: F811

import asyncio
import copy
import importlib
import io
import json
import os
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from IPython.core.events import EventManager
from PIL import Image
from test_widgets import CLASSES, bank, encoder, from_page, scene  # noqa: F401  (fixtures are found by name)

from aoi_ssl import show
from aoi_ssl.core import AoiError
from aoi_ssl.recall import predict_box, query_keys
from aoi_ssl.remember import learn_space, recipe_name
from aoi_ssl.retrieval import BANK_TENSORS, empty_bank
from aoi_ssl.teach import Labels, learn_image, odd_shares, stroke_mask
from aoi_ssl.teach import teach as teach_kept

teach = partial(teach_kept, journal=None)  # a test begins afresh


@pytest.fixture
def pair(scene):
    return {"one": scene[0][0], "two": scene[0][1]}


def test_strokes_cover_what_they_say():
    image = np.zeros((2, 20, 30), np.float32)
    assert np.argwhere(stroke_mask(image, "brush", [(4, 4)], size=1)).tolist() == [[4, 4]]
    line = stroke_mask(image, "line", [(2.5, 10.5), (20.5, 10.5)], size=3)
    assert line[9:12, 3:20].all() and line.sum(1).nonzero()[0].tolist() == [9, 10, 11]
    square = stroke_mask(image, "polygon", [(2, 3), (8, 3), (8, 9), (2, 9)])
    assert np.argwhere(square).min(0).tolist() == [3, 2] and square.sum() == 36
    image[:, 5:9, 5:9] = 1
    assert (stroke_mask(image, "flood", [(6, 6)]) == (image[0] > 0)).all()
    for wrong in (
        ("line", [(1, 1)]),
        ("polygon", [(1, 1), (2, 2)]),
        ("spray", [(1, 1)]),
        ("brush", [(-5, -5)]),
        ("flood", [(99, 1)]),
    ):
        with pytest.raises(AoiError):
            stroke_mask(image, *wrong)


def test_classes_overlap_unless_replaced_and_background_clears(pair, encoder):
    handle = teach(pair, encoder, classes=CLASSES, learning=False)
    square = [(0, 0), (8, 0), (8, 8), (0, 8)]
    handle.paint("epoxy", "polygon", square).paint("wire", "polygon", square)
    assert handle.labels[:, 2, 2].tolist() == [True, False, False, True] and handle.known.sum() == 64
    handle.paint("ball", "polygon", square, only=True)
    assert handle.labels[:, 2, 2].tolist() == [False, True, False, False]
    handle.paint("background", "polygon", square)
    assert not handle.labels[:, 2, 2].any() and handle.known[2, 2]
    handle.paint(None, "polygon", square)
    assert not handle.known.any()
    for _ in range(5):
        handle.undo()
    assert not handle.known.any() and not handle.state["undo"] and handle.state["redo"]
    handle.redo().redo()
    assert handle.labels[:, 2, 2].tolist() == [True, False, False, True]
    assert not handle.undo().paint("ball", "polygon", square).state["redo"]  # a new stroke ends what was undone


def test_the_bank_learns_only_what_is_labelled(pair, encoder, scene):
    handle = teach(pair, encoder, classes=CLASSES, method="paper")
    assert handle.prediction.max() == 0 and len(handle.bank.keys) == 0
    row, column = np.argwhere(scene[2][0] == 2)[0]
    y, x = row * 8, column * 8
    handle.paint("wedge", "polygon", [(x, y), (x + 8, y), (x + 8, y + 8), (x, y + 8)])
    assert len(handle.bank.keys) == 1 and len(handle.bank.images) == 1
    assert handle.prediction.max() == 0 and "not wedge" in handle.state["hint"]  # nothing is known that is no wedge
    handle.rest()
    assert handle.state["hint"] == ""
    assert len(handle.bank.keys) == 48
    assert handle.undo().undo() is handle and len(handle.bank.keys) == 0 and handle.bank.images == []


def test_a_patch_that_is_taught_is_found_in_the_next_image(pair, encoder, scene):
    "All patches of kind 2 in image one are painted wedge, the rest is background: image two has the wedges where kind 2 is."
    _, masks, maps = scene
    handle = teach(pair, encoder, classes=CLASSES, method="paper", learning=False)
    for row, column in np.argwhere(maps[0] == 2):
        y, x = row * 8, column * 8
        handle.paint("wedge", "polygon", [(x, y), (x + 8, y), (x + 8, y + 8), (x, y + 8)])
    handle.rest().learn()
    handle.go(1)
    assert ((handle.prediction[2] > 0.5) == masks[1][2].numpy()).all() and not (
        handle.prediction[[0, 1, 3]] > 0.5
    ).any()
    handle.accept()
    assert handle.known.all() and (handle.labels[2] == masks[1][2].numpy()).all()
    assert handle.progress.stem.tolist() == ["one", "two"] and handle.suggest() == 0


def test_the_journal_survives_the_kernel(pair, encoder, tmp_path):
    options = {"classes": CLASSES, "journal": tmp_path / "j.jsonl"}
    before = teach(pair, encoder, **options)
    before.paint("wire", "line", [(3, 3), (40, 30)], size=3).paint("epoxy", "circle", [(20, 20), (26, 20)])
    before.undo().redo().rest().go(1).accept().paint("ball", "brush", [(9, 9)], size=4)
    after = teach(pair, encoder, **options)
    assert after.index == 1
    for i in range(2):
        assert (after.labels_of(i).mask == before.labels_of(i).mask).all() and (
            after.labels_of(i).known == before.labels_of(i).known
        ).all()
        assert np.allclose(after.go(i).prediction, before.go(i).prediction)
    assert after.go(1).undo().labels[1].sum() == 0  # what was done before can be undone
    with pytest.raises(AoiError, match="same classes"):
        teach(pair, encoder, classes=["wire"], journal=tmp_path / "j.jsonl")
    with pytest.raises(AoiError, match="not among"):
        teach({"two": pair["two"]}, encoder, **options)


def test_labels_survive_the_kernel_without_a_word(pair, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = teach_kept(pair, encoder, classes=CLASSES, learning=False)
    assert [*tmp_path.iterdir()] == []  # who only looks leaves nothing behind
    before.paint("wire", "line", [(3, 3), (40, 30)], size=3)
    (path,) = tmp_path.iterdir()
    assert str(path) in before.kept and path.name.startswith("teach_") and path.suffix == ".jsonl"
    after = teach_kept(pair, encoder, classes=CLASSES, learning=False)
    assert (after.labels == before.labels).all() and after.labels.any() and "1 steps were done again" in after.kept
    swapped = {"one": pair["two"], "two": pair["one"]}
    for images, classes in ((swapped, CLASSES), ([*pair.values()], CLASSES), (pair, ["wire"])):
        other = teach_kept(images, encoder, classes=classes, learning=False)
        assert not other.known.any() and other.journal.path != before.journal.path
    assert teach_kept(swapped, encoder, classes=CLASSES, learning=False).kept.endswith(f"journal='{path.name}'.")  # names are alike
    more = teach_kept(pair | {"three": pair["one"]}, encoder, classes=CLASSES, learning=False)
    assert not more.known.any() and path.name in more.kept
    (tmp_path / "teach_broken.jsonl").write_text("{")
    assert "broken" not in teach_kept(swapped, encoder, classes=CLASSES, learning=False).kept
    for nothing in (None, False):
        lost = teach_kept(pair, encoder, classes=CLASSES, journal=nothing, learning=False).paint("wire", "brush", [(3, 3)])
        assert lost.journal.path is None and "gone with the kernel" in lost.kept and not lost.labels[:, 20:].any()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "gone with the kernel" in teach_kept(pair, encoder, classes=CLASSES).kept


def test_the_journal_of_a_dataset_knows_it_by_names_and_one_image(folder, tmp_path, monkeypatch):
    from aoi_ssl.data import load_folder
    from aoi_ssl.encoder import PixelEncoder

    monkeypatch.chdir(tmp_path)
    dataset, encoder = load_folder(folder)["pretrain"], PixelEncoder(channels=2)
    paths = [teach_kept(dataset.select(rows), encoder, classes=CLASSES).journal.path for rows in ([0, 1], [0, 1], [1, 0], [0, 2])]
    assert paths[0] == paths[1] and len({*paths}) == 3


def test_teach_on_images_larger_than_the_overview(encoder):
    for side in (1030, 2050):
        images = {"a": torch.rand(2, side, 1000), "b": torch.zeros(2, 64, 64)}
        handle, sent = teach(images, encoder, classes=CLASSES, learning=False), []
        handle.send = lambda content, buffers=None: sent.append((content, buffers))  # noqa: B023
        handle.paint("wire", "line", [(10, side - 40), (100, side - 20)], size=1)
        update, buffers = next(found for found in sent if found[0]["source"] == "0")
        plane = np.asarray(Image.open(io.BytesIO(buffers[0])))[..., 0]
        times = 2 ** handle.sources[0]["level"]
        expected = handle.labels[0, : side // times * times].reshape(-1, times, 1000 // times, times).any((1, 3))
        got, (rows, columns) = np.zeros_like(expected), plane.shape
        got[update["y"] : update["y"] + rows, update["x"] : update["x"] + columns] = plane[: len(expected) - update["y"]] > 0
        assert update["start"] == 2 and times > 1 and (got == expected).all() and expected.any() and plane.size < expected.size / 20
        handle._handle_custom_msg({"kind": "refresh"}, [])
        assert handle.error == "" and [c["count"] for c, _ in sent[-3:-1]] == [9, 4]  # all of it, of both images


def test_masks_are_saved_in_the_contract_and_never_replaced_unasked(folder, tmp_path):
    from aoi_ssl.data import load_folder
    from aoi_ssl.encoder import PixelEncoder

    dataset = load_folder(folder)["pretrain"].select([0, 1])
    encoder = PixelEncoder(channels=2)
    handle = teach(dataset, encoder, classes=CLASSES, out=tmp_path / "masks", learning=False)
    handle.paint("wire", "line", [(10, 10), (100, 80)], size=5).paint("background", "circle", [(200, 200), (220, 200)])
    handle.go(1).paint("ball", "circle", [(50, 50), (60, 50)]).rest()
    table = handle.save()
    assert (
        table.stem.tolist() == list(dataset["stem"]) and handle.save() is not None
    )  # its own files may be written again
    loaded = load_folder(folder, masks=tmp_path / "masks", classes=CLASSES)
    rows = {r["stem"]: r for split in loaded.values() for r in split if r["labelled"]}
    for i, stem in enumerate(table.stem):
        assert (rows[stem]["mask"].numpy() == handle.labels_of(i).mask).all()
        assert (rows[stem]["ignore"].numpy() == ~handle.labels_of(i).known).all()
    other = teach(
        dataset, encoder, classes=CLASSES, out=tmp_path / "masks", journal=tmp_path / "other.jsonl", learning=False
    )
    with pytest.raises(AoiError, match="no label"):
        other.save()
    other.paint("wire", "line", [(10, 10), (20, 20)])
    with pytest.raises(AoiError, match="there already"):
        other.save()
    other._handle_custom_msg({"kind": "save"}, [])
    assert other.question.endswith("Replace them?") and other.error == ""
    other._handle_custom_msg({"kind": "save", "overwrite": True}, [])
    assert other.question == "" and "Saved" in other.state["hint"]
    bits = teach(dataset, encoder, classes=["wire"], learning=False)
    with pytest.raises(AoiError, match="Where to"):
        bits.save()


def test_masks_of_labels_that_were_taken_back_are_removed_when_told(pair, encoder, tmp_path):
    handle = teach(pair, encoder, classes=CLASSES, out=tmp_path, learning=False)
    handle.paint("wire", "line", [(3, 3), (40, 30)]).go(1).paint("ball", "brush", [(9, 9)]).save()
    before = sorted(p.name for p in tmp_path.glob("*.png"))
    handle.undo()
    with pytest.raises(AoiError, match=r"\d masks are of images that have no label any more.*two_.*overwrite=True to remove them"):
        handle.save()
    handle._handle_custom_msg({"kind": "save"}, [])
    assert handle.question.endswith("Remove them?") and handle.error == "" and sorted(p.name for p in tmp_path.glob("*.png")) == before
    handle._handle_custom_msg({"kind": "save", "overwrite": True}, [])
    assert handle.question == "" and "Saved the masks of 1 images" in handle.state["hint"] and "Removed those of 1" in handle.state["hint"]
    assert not [*tmp_path.glob("two*")] and [*tmp_path.glob("one*")]
    handle.go(0).undo()
    assert handle.save(overwrite=True).to_dict("records") == [{"stem": "one", "file": "", "labelled": 0.0}]
    assert not [*tmp_path.glob("*.png")]
    with pytest.raises(AoiError, match="no label to save"):
        handle.save(overwrite=True)
    handle.redo().go(1).redo().save()
    again = teach(pair, encoder, classes=CLASSES, out=tmp_path, learning=False)
    again.paint("wire", "brush", [(9, 9)]).go(1).paint("ball", "brush", [(9, 9)]).undo()
    again._handle_custom_msg({"kind": "save"}, [])
    assert again.question.endswith("Replace and remove them?")


def test_teach_and_its_twin_draw_the_same(pair, bank, folder):
    from aoi_ssl.data import load_folder

    learned = copy.deepcopy(bank)
    learned.thresholds[:] = 0.3
    handle = teach(pair, learned.encoder, learned, CLASSES, light="mean", opacity=0.4, index=1, learning=False)
    handle.paint("wire", "line", [(3, 3), (40, 30)]).paint("epoxy", "circle", [(30, 20), (36, 20)])
    labels = {"two": (handle.labels, handle.known)}
    twin = show.teach(pair, learned.encoder, learned, CLASSES, light="mean", opacity=0.4, index=1, learning=False, labels=labels)
    pixels = [np.asarray(Image.open(io.BytesIO(f._repr_png_())).convert("RGB")).astype(int) for f in (handle.picture(), twin)]
    assert pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() < 0.5 and handle.picture().alt == twin.alt
    data = load_folder(folder)["train"]
    assert "labels on 100.0%" in show.teach(data, None).alt and data["stem"][0] in show.teach(data, None).alt
    rows = [data[0], data[1]]
    assert show.teach(rows, None, classes=CLASSES).alt == teach(rows, bank.encoder, classes=CLASSES).picture().alt
    assert show.teach({"a": rows[0]["image"]}, None, classes=CLASSES).alt.count("predicted") == 1
    for wrong in ({"classes": ["wire"]}, {"index": 2}):
        with pytest.raises(AoiError):
            show.teach(pair, bank.encoder, bank, **wrong)
    with pytest.raises(AoiError, match="classes"):
        show.teach(pair, bank.encoder)


def test_predictions_are_striped_and_labels_filled():
    "Where one class is both labelled and predicted, the two can be told apart without colour: by how much of an area is painted."
    grey, mask = np.full((2, 64, 64), 0.5, np.float32), np.zeros((4, 64, 64), bool)
    mask[3, 8:56, 8:56] = True
    picture = show.taught([("a", grey, mask, np.ones((64, 64), bool), mask)], CLASSES, width=9)
    painted = []
    for axes in picture.axes:
        panel = axes.images[0].get_array()
        inside = panel[len(panel) // 4 : -len(panel) // 4, len(panel) // 4 : -len(panel) // 4]
        painted.append((np.ptp(inside, axis=-1) > 0.05).mean())
    assert painted[0] == 1 and 0.2 < painted[1] < 0.3
    assert {"labelled", "predicted"} <= {t.get_text() for t in picture.texts}


def test_the_page_of_teach(pair, encoder):
    handle = teach(pair, encoder, classes=CLASSES)
    sent = []
    handle.send = lambda content, buffers=None: sent.append((content, buffers))
    handle._handle_custom_msg(
        {"kind": "paint", "id": 7, "tool": "line", "class": "wire", "points": [[2, 2], [30, 30]], "size": 3}, []
    )
    assert handle.labels[0].any() and handle.error == ""
    assert [c["kind"] for c, _ in sent] == ["update", "update", "update", "done"] and sent[-1][0]["done"] == 7
    assert [(c["source"], c["start"], c["count"]) for c, _ in sent[:3]] == [("0", 2, 5), ("0", 7, 4), ("1", 2, 4)]
    update, buffers = sent[0]
    planes = np.concatenate([np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in buffers])[
        : update["count"]
    ]
    box = tuple(slice(update[a], update[a] + n) for a, n in zip("yx", planes.shape[1:], strict=True))
    assert (
        (planes[0] == handle.labels[0][box] * 255).all() and (planes[4] == handle.known[box] * 255).all()
    )
    assert handle.known[box].sum() == handle.known.sum() and planes[4].size < handle.known.size / 2  # what changed, and no more
    handle._handle_custom_msg(
        {"kind": "paint", "id": 8, "tool": "polygon", "class": "wire", "points": [[2, 2]], "size": 3}, []
    )
    assert "3 points" in handle.error and sent[-1][0] == {
        "kind": "done",
        "done": 8,
    }  # the trace of a failed stroke disappears
    handle._handle_custom_msg({"kind": "go", "index": 1}, [])
    assert handle.index == 1 and handle.sources[0]["name"] == "two" and handle.next_index == 0
    from_page(handle, brush="tape")
    assert "tape" in handle.error and handle.brush == "wire"
    from_page(handle, index=5)
    assert handle.index == 1
    assert handle.picture().alt


def message(do, **more):
    "What the page sends for a stroke along a line, or for something else."
    stroke = {"tool": "line", "class": "wire", "points": [[2, 2], [30, 30]], "size": 3}
    return {"kind": do, "id": 1} | (stroke if do == "paint" else {}) | more


async def idle(handle):
    "Let the loop run until nothing is left to do."
    while handle._timer is not None:
        await asyncio.sleep(0.01)


def test_strokes_are_answered_first_and_learned_together(pair, encoder, monkeypatch):
    module, learned, sent = importlib.import_module("aoi_ssl.teach"), [], []
    learn = module.learn_image
    monkeypatch.setattr(module, "learn_image", lambda bank, name, *rest, **more: (learned.append(name), learn(bank, name, *rest, **more)))
    monkeypatch.setattr(module, "BOX", 32)  # the images have 48 x 64 pixels: four boxes

    async def session():
        handle = teach(pair, encoder, classes=CLASSES)
        await idle(handle)
        handle.send = lambda content, buffers=None: sent.append(content)
        for n in range(8):
            handle._handle_custom_msg(message("paint", points=[[2, 4 * n], [50, 4 * n]], size=1, **{"class": CLASSES[n % 2]}), [])
        assert [c["kind"] for c in sent] == ["update", "done"] * 8 and learned == [] and handle.labels[:2, ::4, 10].sum() == 8
        assert {c["count"] for c in sent if c["kind"] == "update"} == {5} and handle.state["shares"][0] > 0
        await idle(handle)
        assert learned == ["one"] and handle.error == ""
        assert [(c["source"], c["start"]) for c in sent[16:]] == [("0", 7)] * 4 + [("1", 2)] * 4  # this image, then the next one
        assert (sent[16]["y"], sent[16]["x"]) in ((0, 0), (24, 0), (0, 32), (24, 32))
        assert np.abs(handle._planes["0"].data[7:] / 255 - handle.prediction).max() < 1 / 255 and handle.prediction.any()
        once = teach(pair, encoder, classes=CLASSES)
        for n in range(8):
            once.paint(CLASSES[n % 2], "line", [(2, 4 * n), (50, 4 * n)], size=1)
        assert same_bank(handle.bank, once.bank) and np.array_equal(handle.prediction, once.prediction)
        return handle

    asyncio.run(session())


def test_a_stroke_interrupts_the_prediction(pair, encoder, monkeypatch):
    module, predicted = importlib.import_module("aoi_ssl.teach"), []
    monkeypatch.setattr(module, "BOX", 16)
    predict = module.predict_box
    monkeypatch.setattr(module, "predict_box", lambda bank, image, keys, box: (predicted.append(box), predict(bank, image, keys, box))[1])

    async def session():
        handle = teach(pair, encoder, classes=CLASSES)
        await idle(handle)
        handle._handle_custom_msg(message("paint", points=[[60, 40], [62, 46]]), [])
        while len(predicted) < 3:
            await asyncio.sleep(0.005)
        assert predicted[0] == (32, 48, 48, 64)  # where the stroke is
        predicted.clear()
        handle._handle_custom_msg(message("paint", points=[[2, 2], [8, 8]], **{"class": "ball"}), [])
        await idle(handle)
        assert predicted[0] == (0, 16, 0, 16) and len(predicted) == 24  # all of both images, with both strokes
        expected = handle.bank.predict(pair["one"][None])[0].numpy()
        assert np.abs(handle.prediction - expected).max() < 1e-5 and len(predicted) == 24

    asyncio.run(session())


@pytest.mark.parametrize("changes", [{"decoder": "mixture", "query_shifts": 4}, {"routes": 1, "refine": 3}, {"halo": 0}])
def test_boxes_are_what_the_bank_predicts(pair, encoder, scene, changes):
    made = empty_bank(pair, encoder, CLASSES, method="fast", **changes)
    for name, device, mask in zip(pair, ("a", "b"), scene[1], strict=False):
        learn_image(made, name, pair[name].numpy(), Labels(mask.numpy(), np.ones(mask.shape[1:], bool)), device=device)
    with warnings.catch_warnings(action="ignore"):
        made.calibrate(ks=(4,))
    image = torch.cat([pair["two"], pair["one"]], 2)[:, 3:]
    keys, whole = query_keys(made, image), made.predict(image[None])[0]
    assert whole.std() > 0.05
    for top, bottom, left, right in ((0, 20, 0, 50), (20, 45, 50, 128), (7, 31, 33, 99), (0, 45, 0, 128)):
        found = predict_box(made, image, keys, (top, bottom, left, right))
        assert (found - whole[:, top:bottom, left:right]).abs().max() < 1e-4


def test_whoever_asks_gets_all_strokes(pair, encoder, bank, monkeypatch):
    shell = type("Shell", (), {"events": EventManager(None, dict.fromkeys(("pre_run_cell", "post_run_cell"), lambda result: None))})()
    monkeypatch.setattr(importlib.import_module("aoi_ssl.teach"), "get_ipython", lambda: shell)

    async def session():
        mine = copy.deepcopy(bank)
        handle = teach(pair, mine.encoder, mine)
        await idle(handle)
        count = len(mine.keys)
        handle._handle_custom_msg(message("paint"), [])
        assert len(mine.keys) == count and handle._timer is not None
        shell.events.trigger("pre_run_cell", None)  # a cell is run before the loop had time
        assert len(mine.keys) > count
        for ask in (lambda: handle.prediction, lambda: handle.bank, lambda: handle.picture(), lambda: handle.suggest()):
            handle._handle_custom_msg(message("undo"), [])
            handle._handle_custom_msg(message("paint", size=5), [])
            assert handle._unlearned
            ask()
            assert not handle._unlearned and mine.images[-1]["stem"] == "one"
        expected = handle.bank.predict(pair["one"][None])[0].numpy()
        assert np.abs(handle.prediction - expected).max() < 1e-5 and handle._predicted[0].left == []
        sent = []
        handle.send = lambda content, buffers=None: sent.append(content)
        await idle(handle)
        assert ("0", 7) in [(c["source"], c["start"]) for c in sent if c["kind"] == "update"]  # the page is told as well
        handle._handle_custom_msg(message("undo"), [])
        sent.clear()
        assert handle.settle() is handle and handle._timer is None and not handle._unlearned
        assert [c["source"] for c in sent] == ["0", "1"]

    asyncio.run(session())


def test_a_bank_that_is_given_goes_on_learning(pair, encoder, bank):
    bank = copy.deepcopy(bank)
    handle = teach(pair, bank.encoder, bank)
    assert handle.classes == CLASSES and handle.prediction.max() > 0
    patches = len(bank.keys)
    handle.paint("wire", "line", [(0, 0), (63, 0)], size=2)
    assert len(bank.keys) == patches + 8 and [r["stem"] for r in bank.images] == ["b_01", "one"]
    with pytest.raises(AoiError, match="classes"):
        teach(pair, bank.encoder, bank, ["tape"])


def test_undoing_restores_overlaps():
    labels = Labels(np.ones((2, 4, 4), bool), np.ones((4, 4), bool))
    where = np.eye(4, dtype=bool)
    labels.change(where, np.zeros((2, 4), bool), False)
    assert not labels.mask[:, where].any() and labels.mask.sum() == 24
    labels.undo()
    assert labels.mask.all() and labels.known.all()


# the bank that is made


def finish(handle, index, mask):
    "Label an image as a whole, by its truth."
    handle.go(index)
    for name, plane in zip(CLASSES, mask, strict=True):
        for y, x in np.argwhere(np.asarray(plane)[::8, ::8]):
            handle.paint(name, "polygon", [(8 * x, 8 * y), (8 * x + 8, 8 * y), (8 * x + 8, 8 * y + 8), (8 * x, 8 * y + 8)])
    return handle.rest()


def apart(images, encoder, masks, count, method="fast"):
    "The same bank without a widget: empty, then taught the first images, then calibrated as the widget does."
    made = empty_bank(images, encoder, CLASSES, method=method, k=8)
    for name, mask in list(zip(images, masks, strict=True))[:count]:
        learn_image(made, name, images[name].numpy(), Labels(mask.numpy(), np.ones(mask.shape[1:], bool)))
    with warnings.catch_warnings(action="ignore"):  # one image: its halves
        made.calibrate(ks=(8,), max_patches=2048)
    return made


def test_a_new_bank_is_fast_and_its_space_comes_from_the_images(pair, encoder):
    handle = teach(pair, encoder, classes=CLASSES)
    assert recipe_name(handle.bank.recipe) == "fast" and handle.bank.k == 8 and len(handle.bank.keys) == 0 and not handle.given
    assert handle.bank.space.fingerprint() == learn_space([*pair.values()], encoder, method="fast").fingerprint()
    assert recipe_name(teach(pair, encoder, classes=CLASSES, method="aligned").bank.recipe) == "aligned"
    mine = empty_bank(pair, encoder, CLASSES, method="fast", bank_shifts=2)
    assert teach(pair, encoder, mine).bank is mine


def test_thresholds_are_chosen_when_an_image_is_whole(pair, encoder, scene):
    _, masks, _ = scene
    handle = teach(pair, encoder, classes=CLASSES, learning=False)
    handle.paint("wire", "line", [(0, 0), (63, 47)], size=9).paint("background", "circle", [(50, 9), (54, 9)]).learn()
    assert handle.cuts == [0.5] * 4 and len(handle.bank.keys) > 0  # half painted: no base for a threshold
    handle.undo().undo()
    for count in (1, 2):
        finish(handle, count - 1, masks[count - 1]).learn()
        expected = apart(pair, encoder, masks, count)
        assert handle.bank.keys.equal(expected.keys) and handle.cuts == expected.thresholds.tolist() == handle.bank.thresholds.tolist()
    before = handle.cuts
    handle.learning = True
    handle.paint("ball", "brush", [(9, 9)], size=4)
    assert handle.cuts == before  # a stroke keeps them
    handle.go(0)
    assert not handle._due and handle.bank.thresholds.tolist() == handle.cuts  # and leaving the image looks again


def test_a_half_painted_image_has_no_say(pair, encoder, scene):
    _, masks, _ = scene
    handle = finish(teach(pair, encoder, classes=CLASSES, learning=False), 0, masks[0]).learn()
    chosen = handle.cuts
    handle.go(1).paint("wire", "line", [(0, 0), (63, 47)], size=9).learn()
    assert handle.cuts == chosen and len(handle.bank.images) == 2


def test_a_class_that_is_not_labelled_yet_keeps_its_threshold(pair, encoder, scene):
    _, masks, _ = scene
    handle = finish(teach(pair, encoder, classes=[*CLASSES, "tape"], learning=False), 0, masks[0]).learn()
    assert handle.cuts[4] == 0.5 and handle.cuts[:4] != [0.5] * 4  # a bank alone would say 1: never


# whose thresholds


def test_a_threshold_set_by_hand_stays_until_it_is_given_back(pair, encoder, scene):
    _, masks, _ = scene
    free = finish(teach(pair, encoder, classes=CLASSES, learning=False), 0, masks[0]).learn()
    handle = teach(pair, encoder, classes=CLASSES, learning=False)
    handle.cuts = [0.5, 0.5, 0.7, 0.5]
    assert handle.by_hand == ["wedge"] and np.allclose(handle.bank.thresholds, [0.5, 0.5, 0.7, 0.5])
    finish(handle, 0, masks[0]).learn()
    assert np.allclose(handle.cuts, [*free.cuts[:2], 0.7, free.cuts[3]])
    from_page(handle, cuts=[0.25, *handle.cuts[1:]])
    assert handle.by_hand == ["wire", "wedge"] and handle.bank.thresholds[0] == 0.25
    handle.learn()
    assert np.allclose(handle.cuts, [0.25, free.cuts[1], 0.7, free.cuts[3]])
    handle._handle_custom_msg({"kind": "release", "class": "wedge"}, [])
    assert handle.by_hand == ["wire"] and np.allclose(handle.cuts, [0.25, *free.cuts[1:]])
    assert handle.threshold("wire", None).cuts == free.cuts and handle.by_hand == []
    assert handle.threshold("ball", free.cuts[1]).by_hand == ["ball"] and handle.learn().cuts == free.cuts
    with pytest.raises(AoiError, match="'tape'"):
        handle.threshold("tape", 0.5)
    from_page(handle, cuts=[0.5, 0.5, 2, 0.5])
    assert "0 .. 1" in handle.error and handle.cuts == free.cuts


def test_accepting_goes_by_the_thresholds_that_are_shown(pair, encoder, scene):
    _, masks, _ = scene
    handle = finish(teach(pair, encoder, classes=CLASSES, learning=False), 0, masks[0]).learn().go(1)
    handle.threshold("epoxy", 1.0).accept()
    assert not handle.labels[3].any() and handle.labels[0].any()
    assert (handle.labels[0] == (handle.prediction[0] > handle.cuts[0])).all()


def test_a_bank_that_is_given_keeps_its_thresholds_unless_asked(pair, bank):
    bank = copy.deepcopy(bank)
    bank.thresholds = torch.tensor([0.2, 0.3, 0.4, 0.6])
    handle = teach(pair, bank.encoder, bank)
    handle.rest()
    assert np.allclose(handle.cuts, [0.2, 0.3, 0.4, 0.6]) and handle.by_hand == [] and not handle._due
    handle.threshold("epoxy", 0.9).threshold("epoxy", None)
    assert np.allclose(handle.cuts, [0.2, 0.3, 0.4, 0.6])
    handle.calibrate()
    assert handle.bank.thresholds.tolist() == handle.cuts and not np.allclose(handle.cuts, [0.2, 0.3, 0.4, 0.6])


def test_what_is_done_to_the_bank_in_a_cell_is_noticed(pair, encoder, scene, monkeypatch):
    _, masks, _ = scene
    shell = type("Shell", (), {"events": EventManager(None, dict.fromkeys(("pre_run_cell", "post_run_cell"), lambda result: None))})()
    monkeypatch.setattr(importlib.import_module("aoi_ssl.teach"), "get_ipython", lambda: shell)
    handle = finish(teach(pair, encoder, classes=CLASSES, learning=False), 0, masks[0]).learn()
    sent, shown = [], handle.prediction.copy()
    handle.send = lambda content, buffers=None: sent.append(content["kind"])
    shell.events.trigger("post_run_cell", None)
    assert sent == [] and handle.by_hand == []  # nothing was done
    shell.events.trigger("pre_run_cell", None)
    handle.bank.thresholds[1] = 0.9
    shell.events.trigger("post_run_cell", None)
    assert handle.cuts[1] == pytest.approx(0.9) and handle.by_hand == ["ball"] and sent == ["update", "update"]
    handle.bank.k = 1
    shell.events.trigger("post_run_cell", None)
    assert len(sent) == 4 and not np.array_equal(handle.prediction, shown) and handle.by_hand == ["ball"]
    handle.bank.calibrate(ks=(2,))
    assert handle.prediction is not None and handle.cuts == handle.bank.thresholds.tolist()  # asking is enough
    assert handle.learn().cuts[1] == handle.bank.thresholds[1]
    handle.close()
    shell.events.trigger("post_run_cell", None)
    assert shell.events.callbacks["post_run_cell"] == []


# a new session


def same_bank(one, other):
    "Whether two banks have the same rows, images, space, k and thresholds."
    rows = all(getattr(one, name).equal(getattr(other, name)) for name in BANK_TENSORS)
    return rows and one.images == other.images and one.k == other.k and one.thresholds.equal(other.thresholds)


def test_a_restart_gives_the_same_bank(pair, encoder, scene, tmp_path):
    _, masks, _ = scene
    options = {"classes": CLASSES, "journal": tmp_path / "j.jsonl"}
    before = teach(pair, encoder, **options)
    before.go(1).paint("wire", "line", [(3, 3), (40, 30)], size=3)
    before.learning = False
    finish(before, 0, masks[0]).learn()
    before.learning = True
    before.go(1).undo().rest().threshold("ball", 0.35).calibrate(ks=(2, 4)).go(0).learn()
    after = teach(pair, encoder, **options)
    assert [r["stem"] for r in after.bank.images] == ["two", "one"] and same_bank(before.bank, after.bank) and after.bank.k in (2, 4)
    assert after.cuts == before.cuts and after.by_hand == ["ball"] and after.index == 0 and not after._due
    lines = options["journal"].read_text()
    assert same_bank(teach(pair, encoder, **options).bank, after.bank)
    assert options["journal"].read_text() == lines  # replaying writes nothing
    other = teach(pair, encoder, method="paper", **options)
    assert other.by_hand == ["ball"] and other.cuts[1] == before.cuts[1] and other.bank.k == 8
    assert other.threshold("ball", None).cuts == teach(pair, encoder, method="paper", **options).cuts


def test_an_older_journal_is_read_and_a_newer_one_refused(pair, encoder, tmp_path):
    path = tmp_path / "j.jsonl"
    stroke = {"do": "paint", "image": "one", "class": "wire", "tool": "line", "points": [[3, 3], [40, 30]], "size": 3}
    old = [{"classes": CLASSES, "version": 1}, stroke, {"do": "rest", "image": "one"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    handle = teach(pair, encoder, classes=CLASSES, journal=path)
    assert handle.known.all() and handle.labels[0].any() and json.loads(path.read_text().splitlines()[0])["version"] == 2
    newer = [{"classes": CLASSES, "version": 3}, stroke]
    path.write_text("".join(json.dumps(line) + "\n" for line in newer))
    with pytest.raises(AoiError, match="as new as the journal"):
        teach(pair, encoder, classes=CLASSES, journal=path)
    path.write_text(json.dumps(old[0]) + "\n" + json.dumps(stroke | {"do": "stamp"}) + "\n")
    with pytest.raises(AoiError, match="'stamp'.*newer aoi_ssl"):
        teach(pair, encoder, classes=CLASSES, journal=path)
    path.write_text("[1]\n")
    with pytest.raises(AoiError, match="begun with"):
        teach(pair, encoder, classes=CLASSES, journal=path)


# a second look


def test_a_class_that_covers_far_more_or_less_is_named(pair, encoder):
    def painted(name, y, width, height):
        return handle.paint(name, "polygon", [(0, y), (width, y), (width, y + height), (0, y + height)])

    handle = teach(pair, encoder, classes=CLASSES, learning=False)
    painted("wire", 0, 20, 10)
    painted("ball", 20, 10, 10)
    assert handle.state["odd"] == []  # not labelled as a whole
    assert handle.rest().state["odd"] == []  # nothing to compare with
    handle.go(1)
    painted("wire", 0, 20, 15)
    painted("ball", 20, 16, 10)
    assert handle.state["odd"] == [] and len(handle.rest().state["odd"]) == 1
    assert handle.state["odd"][0].startswith("ball covers 5.21% here and 3.26%")  # wire: 300 pixels to 200 is 1.5 times, not more
    handle.paint("background", "polygon", [(8, 20), (16, 20), (16, 30), (8, 30)])
    assert handle.state["odd"] == []
    painted("background", 20, 16, 10)
    assert handle.state["odd"][0].startswith("ball covers 0.00% here")
    handle.pile.devices[0] = "another"
    assert odd_shares(handle, 1) == []
