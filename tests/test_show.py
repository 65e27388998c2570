"Pictures: what is drawn is what is there, nothing global changes, and wrong shapes are refused in words."

import copy
import itertools
from io import BytesIO

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from aoi_ssl import show
from aoi_ssl.core import AoiError
from aoi_ssl.encoder import PixelEncoder
from aoi_ssl.metrics import binary_counts

CLASSES = ["wire", "ball", "wedge", "epoxy"]


@pytest.fixture
def image():
    return np.random.default_rng(0).random((2, 48, 64), dtype=np.float32)


@pytest.fixture
def mask():
    mask = np.zeros((4, 48, 64), bool)
    mask[0, 20:23] = True
    mask[1, 15:30, 30:45] = True
    mask[3, 5:40, 10:50] = True
    return mask


def history(n=100):
    frame = pd.DataFrame({"step": range(n), "lr": 1.0, "loss": np.linspace(1, 0.5, n)})
    frame.loc[9::10, "validation_loss"] = 0.7
    frame.loc[9::10, "validation_score"] = 0.3
    return frame


def table():
    pairs = enumerate(itertools.product("ab", CLASSES))
    return pd.DataFrame([{"method": m, "class": c, "iou": i / 10} for i, (m, c) in pairs])


def every(image, mask):
    "One call of each function."
    patches, masks = np.stack([image[:, :16, :16]] * 3), np.stack([mask[:, :16, :16]] * 3)
    return {
        "lights": lambda: show.lights(image, view="both"),
        "overlay": lambda: show.overlay(image, mask, CLASSES),
        "compare": lambda: show.compare(image, {"truth": mask, "bank": ~mask}, CLASSES),
        "errors": lambda: show.errors(image, {"a": mask, "b": ~mask}, mask, CLASSES, ignore=np.roll(mask, 5)),
        "similarity": lambda: show.similarity(image, PixelEncoder(channels=2), y=3, x=60, others=[image]),
        "neighbours": lambda: show.neighbours(patches[0], patches, masks, [0.9, 0.8, 0.7], CLASSES, labels=list("abc")),
        "reconstruction": lambda: show.reconstruction(image, np.eye(3, 4, dtype=bool), image),
        "curves": lambda: show.curves(history()),
        "score_chart": lambda: show.score_chart(table()),
    }


NAMES = list(every(np.zeros((2, 48, 64), np.float32), np.zeros((4, 48, 64), bool)))


def panels(figure):
    "The pictures in the panels."
    return [np.asarray(a.images[0].get_array()) for a in figure.axes if a.images and a.images[0].get_array().ndim == 3]


def has(picture, colour):
    return np.isclose(picture, to_rgb(colour), atol=1e-6).all(-1)


@pytest.mark.parametrize("name", NAMES)
def test_figure_is_closed_global_state_and_arguments_untouched(name, image, mask):
    before, data = matplotlib.rcParams.copy(), copy.deepcopy((image, mask))
    figure = every(image, mask)[name]()
    png = Image.open(BytesIO(figure._repr_png_()))
    assert isinstance(figure, Figure) and figure.alt.strip().endswith(".")
    assert png.size == tuple(np.round(figure.get_size_inches() * 100)) and png.width <= 900
    assert plt.get_fignums() == [] and matplotlib.rcParams == before
    assert np.array_equal(data[0], image) and np.array_equal(data[1], mask)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_runs_over_another_or_off_the_figure(name, image, mask):
    figure = every(image, mask)[name]()
    figure.canvas.draw() if hasattr(figure.canvas, "get_renderer") else figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.texts if t.get_text()]
    for a, b in itertools.combinations(boxes, 2):
        assert not (a.shrunk(0.95, 0.9)).overlaps(b.shrunk(0.95, 0.9))
    for box in boxes:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.height + 1


@pytest.mark.parametrize("name", ["lights", "overlay", "compare", "errors", "similarity", "reconstruction", "neighbours"])
def test_panels_are_painted_at_the_size_at_which_they_are_shown(name, image, mask):
    figure = every(image, mask)[name]()
    for axes in figure.axes:
        if axes.images and axes.images[0].get_array().ndim == 3:
            assert axes.bbox.width == pytest.approx(axes.images[0].get_array().shape[1], abs=0.01)
            assert axes.bbox.height == pytest.approx(axes.images[0].get_array().shape[0], abs=0.01)


def test_first_colours_stay_apart_for_the_colour_blind():
    "Machado et al. 2009, severity 1: protanopia, deuteranopia, tritanopia; distance in CIE Lab."
    eyes = {
        "all": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(colour, eye):
        c = np.array(to_rgb(colour))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        f = to_xyz @ np.clip(np.array(eye) @ linear, 0, 1) / [0.9505, 1, 1.089]
        f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    def least(colours):
        pairs = itertools.product(itertools.combinations(colours, 2), eyes.values())
        return min(np.linalg.norm(lab(a, e) - lab(b, e)) for (a, b), e in pairs)

    assert least(show.PALETTE[:4]) > 24
    assert least(show.ERROR_COLOURS.values()) > 30
    assert len({show.class_colour(k) for k in range(21)}) == 21


def test_thin_wire_survives_a_large_image():
    wire = np.zeros((1, 2000, 3000), bool)
    wire[0, 1001:1004] = True
    (picture,) = panels(show.overlay(np.zeros((1, 2000, 3000), np.float32), wire, ["wire"], width=4))
    assert picture.shape[1] < 400 and has(picture, show.PALETTE[0]).any(0).all()


def test_mask_lies_where_it_is():
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:20, 30:45] = True
    (picture,) = panels(show.overlay(np.zeros((1, 40, 60), np.float32), mask, alpha=1))
    rows, columns = np.nonzero(has(picture, show.PALETTE[0]))
    scale = picture.shape[0] / 40
    assert [rows.min() / scale, (rows.max() + 1) / scale] == pytest.approx([10, 20], abs=0.1)
    assert [columns.min() / scale, (columns.max() + 1) / scale] == pytest.approx([30, 45], abs=0.1)


def test_both_outlines_show_where_classes_overlap(image, mask):
    (picture,) = panels(show.overlay(image, mask, CLASSES))
    inside = picture[int(20 * picture.shape[0] / 48) : int(24 * picture.shape[0] / 48), int(31 * 9.1) : int(44 * 9.1)]
    assert has(inside, show.PALETTE[0]).any()  # the wire under the ball keeps its outline
    for k in (0, 1, 3):
        assert has(picture, show.PALETTE[k]).any()
    assert not has(picture, show.PALETTE[2]).any()


def test_false_colour_is_grey_where_lights_agree_and_names_the_lights(image):
    assert np.allclose(show.false_colour(np.full((2, 3, 3), 0.3)), 0.3)
    only = np.zeros((2, 4, 4), np.float32)
    only[0] = 1
    red, _, blue = show.false_colour(only)[0, 0]
    assert red > blue and show.false_colour(only[::-1])[0, 0, 2] > 0.8
    assert len(show.lights(image, view="colour", names=["coaxial", "ring"]).axes) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 7), (6, 20, 20), (2, 16, 1500), (2, 1500, 16)])
def test_any_number_of_lights_and_any_shape(shape):
    image, mask = np.zeros(shape, np.float32), np.ones((2, *shape[1:]), bool)
    for figure in (show.lights(image, view="both"), show.overlay(image, mask), show.errors(image, mask, mask)):
        assert panels(figure) and max(figure.get_size_inches()) <= 25


def test_tensors_of_any_kind_are_taken(image, mask):
    tensor = torch.as_tensor(image).bfloat16().requires_grad_()
    assert show.overlay(tensor, torch.as_tensor(mask), CLASSES).axes
    assert show.lights(torch.as_tensor(image).double().transpose(1, 2)).axes
    assert show.similarity(image, torch.rand(3, 4, 5, requires_grad=True), y=0, x=0, patch_size=16).axes


def test_dark_image_can_be_stretched(image):
    dark = panels(show.lights(image * 0.05))[0]
    assert dark.max() < 0.06 < 0.9 < panels(show.lights(image * 0.05, stretch=True))[0].max()


def test_text_from_outside_is_never_read_as_mathematics(image, mask):
    assert show.overlay(image, mask, ["$wire_", "\\frac", "<b>", "é"], title="lot $5_a$ of \\frac{")._repr_png_()
    assert show.score_chart(table().replace({"class": {"wire": "$x_"}}), title="$_")._repr_png_()


def test_errors_count_what_the_metrics_count(image, mask):
    predicted, ignore = np.roll(mask, 4, axis=2), np.zeros_like(mask)
    ignore[:, :, :15] = True
    alt = show.errors(image, predicted, mask, CLASSES, ignore=ignore).alt
    counts = binary_counts(*map(torch.as_tensor, (predicted, mask, ignore)))
    for name, row in zip(CLASSES, counts, strict=True):
        words = "absent, and not predicted"
        if row.sum():
            words = "hit {:.0%}, false {:.0%}, missed {:.0%}".format(*(row / row.sum()).tolist())
        assert f"{name} {words}" in alt


def test_errors_colour_hits_false_alarms_and_misses():
    truth, predicted = np.zeros((1, 30, 30), bool), np.zeros((1, 30, 30), bool)
    truth[0, :, :20], predicted[0, :, 10:] = True, True
    (picture,) = panels(show.errors(np.zeros((1, 30, 30), np.float32), predicted, truth, width=3))
    third = picture.shape[1] // 3
    assert has(picture[:, 5 : third - 5], show.ERROR_COLOURS["missed"]).all()
    assert has(picture[:, third + 5 : 2 * third - 5], show.ERROR_COLOURS["hit"]).all()
    assert has(picture[:, 2 * third + 5 : -5], show.ERROR_COLOURS["false alarm"]).all()


def test_ignored_pixels_are_hatched_and_unannotated_classes_named(image, mask):
    ignore = np.zeros_like(mask)
    ignore[2] = True
    figure = show.overlay(image, mask, CLASSES, ignore=ignore)
    texts = [t.get_text() for t in figure.texts]
    assert "wedge (not annotated)" in texts and "ignored" not in texts
    ignore[:, :10, :10] = True
    figure = show.overlay(image * 0, mask, CLASSES, ignore=ignore)
    assert "ignored" in [t.get_text() for t in figure.texts]
    (picture,) = panels(figure)
    assert has(picture[:60, :60], "0.75").mean() > 0.15 and not has(picture[200:, 200:], "0.75").any()
    assert "wedge not annotated" in show.errors(image, mask, mask, CLASSES, ignore=ignore).alt


def test_compare_tells_the_iou_of_summed_classes_only_with_a_truth(image, mask):
    alt = show.compare(image, {"truth": mask, "same": mask, "moved": np.roll(mask, 40, axis=1)}, CLASSES).alt
    assert "same, mIoU 1.00" in alt and "moved, mIoU" in alt and "truth, mIoU" not in alt
    assert "mIoU" not in show.compare(image, {"a": mask, "b": mask}, CLASSES).alt
    assert "mIoU" not in show.compare(image, {"truth": mask & False, "none": mask & False}, CLASSES).alt


def test_similarity_holds_the_patch_under_the_pixel_on_any_size():
    image = np.random.default_rng(1).random((2, 40, 72), dtype=np.float32)  # neither side is divided by 16
    grid = PixelEncoder(channels=2, patch_size=16).encode(torch.as_tensor(image)[None])[0]
    found = show.similarity_map(grid, grid[2, 4])
    assert found.shape == (3, 5) and found.argmax() == 2 * 5 + 4 and found.max() == pytest.approx(1)
    marked = torch.zeros(3, 5, 2)
    marked[..., 0], marked[1, 3] = 1, torch.tensor([0.0, 1.0])
    figure = show.similarity(image * 0, marked, y=20, x=50, patch_size=16, alpha=1)
    picture = panels(figure)[1]
    scale = picture.shape[0] / 40
    rows, columns = np.nonzero(has(picture, matplotlib.colormaps["viridis"](1.0)[:3]))
    assert [rows.min() / scale, (rows.max() + 1) / scale] == pytest.approx([16, 32], abs=0.3)
    assert [columns.min() / scale, (columns.max() + 1) / scale] == pytest.approx([48, 64], abs=0.3)


def test_similarity_threshold_leaves_the_rest_bare(image):
    marked = torch.eye(12)[:, :5].reshape(3, 4, 5)
    picture = panels(show.similarity(image * 0, marked, y=0, x=0, patch_size=16, threshold=0.5))[1]
    assert (picture.max(-1) > 0).mean() == pytest.approx(1 / 12, abs=0.01)


def test_reconstruction_hides_what_was_hidden(image):
    hidden = np.zeros((3, 4), bool)
    hidden[0, 0] = True
    original, seen, rebuilt = panels(show.reconstruction(image, hidden, image + 3, light=1))
    scale = seen.shape[1] / 64
    assert np.allclose(seen[: int(15 * scale), : int(15 * scale)], 0.5)
    assert np.allclose(seen[int(18 * scale) :], original[int(18 * scale) :]) and (rebuilt == 1).all()
    whole = np.repeat(np.repeat(hidden, 16, 0), 16, 1)
    assert np.array_equal(panels(show.reconstruction(image, whole, image, light=1))[1], seen)
    assert len(panels(show.reconstruction(image[None], hidden[None], image[None]))) == 6  # two lights
    assert len(panels(show.reconstruction(*(np.stack([a] * 3) for a in (image, hidden, image))))) == 9  # three images


def test_curves_draw_sparse_columns_and_several_runs():
    figure = show.curves({"a": history(), "b": history().drop(columns="validation_score")})
    assert [len(a.lines) for a in figure.axes] == [4, 1]
    marks = [line for line in figure.axes[0].lines if line.get_label() == "a validation loss"][0]
    assert len(marks.get_xdata()) == 10 and np.isfinite(marks.get_ydata()).all()
    assert show.curves(history().assign(validation_score=np.nan))._repr_png_()


def test_curves_smooth_noise_but_keep_a_falling_line():
    frame = pd.DataFrame({"step": range(1000), "loss": np.random.default_rng(0).random(1000)})
    raw, trend = show.curves(frame).axes[0].lines
    assert trend.get_ydata().std() < raw.get_ydata().std() / 2
    (line,) = show.curves(frame.assign(loss=np.linspace(1, 0, 1000))).axes[0].lines
    assert line.get_ydata()[-1] == 0


def test_score_chart_puts_every_number_on_its_row():
    figure = show.score_chart(table())
    first, second = figure.axes[0].lines
    assert list(first.get_xdata()) == [0, 0.1, 0.2, 0.3] and list(second.get_xdata()) == [0.4, 0.5, 0.6, 0.7]
    assert np.round(first.get_ydata()).tolist() == np.round(second.get_ydata()).tolist() == [0, 1, 2, 3]
    assert show.score_chart(table().assign(iou=np.nan))._repr_png_()
    assert show.score_chart(table().query("method == 'a'"), series=None).axes[0].lines


WRONG = {
    "an image without lights": (lambda i, m: show.lights(i[0]), "image[None]"),
    "lights last": (lambda i, m: show.lights(i.transpose(1, 2, 0)), "transpose"),
    "8-bit values": (lambda i, m: show.lights((i * 255).astype(np.uint8)), "divide by 255"),
    "floats up to 255": (lambda i, m: show.lights(i * 255), "divide by 255"),
    "not a number": (lambda i, m: show.lights(i * np.nan), "[0, 1]"),
    "a light that is not there": (lambda i, m: show.overlay(i, m, light=2), "from 0 to 1"),
    "an unknown view": (lambda i, m: show.lights(i, view="blue"), "view='blue'"),
    "one name for two lights": (lambda i, m: show.lights(i, names=["a"]), "1 names for 2 lights"),
    "probabilities": (lambda i, m: show.overlay(i, m.astype(np.float32)), "thresholds"),
    "a mask of another size": (lambda i, m: show.overlay(i, m[:, 1:]), "(classes, 48, 64)"),
    "two names for four classes": (lambda i, m: show.overlay(i, m, ["a", "b"]), "4 layers"),
    "masks of two sizes": (lambda i, m: show.compare(i, {"truth": m, "bank": m[:1]}), "mask 'bank'"),
    "no masks": (lambda i, m: show.compare(i, {}), "one or more"),
    "truth of another size": (lambda i, m: show.errors(i, m, m[:, :9]), "'the truth'"),
    "ignore of another size": (lambda i, m: show.errors(i, m, m, ignore=m[0]), "ignore"),
    "a pixel outside": (lambda i, m: show.similarity(i, torch.rand(3, 4, 2), y=48, x=0, patch_size=16), "outside"),
    "no patch size": (lambda i, m: show.similarity(i, torch.rand(3, 4, 2), y=0, x=0), "patch_size="),
    "another grid": (lambda i, m: show.similarity(i, torch.rand(4, 3, 2), y=0, x=0, patch_size=16), "(3, 4, D)"),
    "others of another size": (lambda i, m: show.similarity(i, PixelEncoder(), y=0, x=0, others=[i[:, 1:]]), "others"),
    "three patches, one mask": (lambda i, m: show.neighbours(i, [i, i, i], [m], [1, 1, 1]), "number of neighbours"),
    "a flat patch mask": (lambda i, m: show.reconstruction(i, np.zeros(12, bool), i), "(rows, columns)"),
    "rebuilt of another size": (lambda i, m: show.reconstruction(i, np.zeros((3, 4), bool), i[:1]), "rebuilt (1, 48, 64)"),
    "too narrow": (lambda i, m: show.lights(i, width=0.5), "wider"),
    "an unknown column": (lambda i, m: show.curves(history(), columns=["dice"]), "dice"),
    "an empty history": (lambda i, m: show.curves(pd.DataFrame()), "columns are []"),
    "an unknown metric": (lambda i, m: show.score_chart(table(), metric="dice"), "dice"),
    "two rows for a mark": (lambda i, m: show.score_chart(pd.concat([table(), table()])), "Sum first"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_in_words(case, image, mask):
    call, words = WRONG[case]
    with pytest.raises(AoiError) as error:
        call(image, mask)
    assert words in str(error.value) and plt.get_fignums() == []


def test_explore_takes_rows_of_a_dataset_and_crosses_out_what_is_subtracted():
    image = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    held = [(8, 8), {"row": 3, "column": 3, "minus": True}]
    figure = show.explore({"image": image, "stem": "a_01"}, PixelEncoder(), held=held, others=[{"image": image, "stem": "b_02"}])
    assert "a_01, held: row 0, column 0, less row 3, column 3" in figure.alt and "b_02: similarity" in figure.alt
    assert [len(panel.patches) for panel in figure.axes[:3]] == [4, 4, 0]  # a light and a dark frame for each
    assert [len(panel.lines) for panel in figure.axes[:3]] == [2, 2, 0]


def test_gallery_keeps_the_shape_of_each_image():
    wide, tall = torch.full((1, 20, 80), 0.0), torch.full((1, 80, 20), 0.0)
    figure = show.gallery({"wide": wide, "tall": tall}, columns=2, width=4)
    panels = [np.asarray(panel.images[0].get_array())[..., 0] for panel in figure.axes]
    assert panels[0].shape == panels[1].shape and figure.alt.startswith("2 images side by side: wide; tall.")
    for panel, image in zip(panels, (wide, tall), strict=True):
        rows, columns = np.flatnonzero((panel < 0.5).any(1)), np.flatnonzero((panel < 0.5).any(0))
        assert abs(len(columns) / len(rows) - image.shape[2] / image.shape[1]) < 0.3
