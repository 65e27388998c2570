"Images of any size and shape through both real segmenters: no border lost, no seam, memory bounded."

import subprocess
import sys

import numpy as np
import pytest
import torch

from aoi_ssl.data import load_folder
from aoi_ssl.encoder import PixelEncoder, ViTEncoder
from aoi_ssl.predict import predict_image
from aoi_ssl.retrieval import build_bank
from aoi_ssl.segment import UperNet
from aoi_ssl.synthetic import CLASSES, render
from aoi_ssl.tiles import windows


@pytest.fixture(scope="module")
def segmenters(folder):
    images = load_folder(folder)["train"].select(range(2))
    return {
        "bank": build_bank(images, PixelEncoder(), method="paper", k=1, calibrate=False),
        "upernet": UperNet.build(ViTEncoder("nano"), CLASSES),
    }


@pytest.mark.parametrize("kind", ["bank", "upernet"])
def test_a_whole_image_of_4096_by_3000(segmenters, kind):
    tile = np.roll(render(5, size=512).image, 256, axis=(1, 2))  # so that the borders cut through the middle of a device
    image = np.tile(tile, (1, 6, 8))[:, :3000]
    probabilities = predict_image(segmenters[kind], image)
    assert probabilities.shape == (len(CLASSES), 3000, 4096)
    assert bool(probabilities.isfinite().all()) and probabilities.min() >= 0 and probabilities.max() <= 1
    assert probabilities[..., -8:, :].std() > 0 and probabilities[..., -8:].std() > 0  # the borders are predicted too


@pytest.mark.parametrize("kind", ["bank", "upernet"])
@pytest.mark.parametrize("shape", [(7, 5), (16, 300), (301, 33), (130, 600)])
def test_small_and_odd_images_keep_their_shape(segmenters, kind, shape):
    probabilities = predict_image(segmenters[kind], torch.rand(2, *shape))
    assert probabilities.shape == (len(CLASSES), *shape) and bool(probabilities.isfinite().all())


def test_a_bank_predicts_the_same_in_windows_as_at_once(segmenters):
    "Windows that start on the patch grid see the same patches, so there is no seam at all."
    image = torch.from_numpy(render(5, size=(512, 960)).image) / 255
    bank = segmenters["bank"]
    torch.testing.assert_close(predict_image(bank, image, size=512, overlap=64), bank.predict(image[None])[0])


def jumps(probabilities, size, overlap, axis):
    "Mean jump from each column (or row) to the next: those where a window begins or ends, and all others."
    step = probabilities.diff(dim=axis).abs().mean([d for d in range(3) if d != axis])
    starts = {y if axis == 1 else x for y, x, _, _ in windows(*probabilities.shape[1:], size=size, overlap=overlap)}
    lines = {line - 1 for start in starts for line in (start, start + size) if 0 < line <= len(step)}
    at = torch.tensor([i in lines for i in range(len(step))])
    return step[at], step[~at]


@pytest.mark.parametrize("axis", [1, 2], ids=["rows", "columns"])
def test_no_seam_shows_in_the_blended_windows_of_a_network(segmenters, axis):
    image = torch.from_numpy(render(5, size=(448, 640)).image) / 255
    blended = predict_image(segmenters["upernet"], image, size=128, overlap=32)
    at, elsewhere = jumps(blended, 128, 32, axis)
    assert len(at) >= 6 and at.max() <= elsewhere.quantile(0.999)
    at, elsewhere = jumps(predict_image(segmenters["upernet"], image, size=128, overlap=0), 128, 0, axis)
    assert at.max() > 2 * elsewhere.quantile(0.999)  # side by side there are seams, so the measure sees them


GROWTH = """
import sys
import numpy as np, torch
from aoi_ssl.predict import Segmenter, predict_image

torch.set_num_threads(1)
segmenter, image = Segmenter.load(sys.argv[1]), np.load(sys.argv[2])
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
predict_image(segmenter, image[:, :512, :2048])
before = peak()
result = predict_image(segmenter, image)
print(peak() - before, result.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count the peak in other units, or not at all")
def test_memory_for_4096_by_3000_is_the_result_and_little_more(segmenters, tmp_path):
    "The peak grows by 244 MiB, 188 of them the result; all windows at once would be 380 MiB more."
    segmenters["bank"].save(tmp_path / "bank")
    np.save(tmp_path / "image.npy", np.tile(render(5, size=512).image, (1, 6, 8))[:, :3000])
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "bank"), str(tmp_path / "image.npy")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    growth, result = map(float, run.stdout.split())
    # not ru_maxrss, which begins at the peak of the process that started this one, and so would hardly grow
    assert result == 187.5 and result / 2 < growth < 2 * result, f"{growth:.0f} MiB for a result of {result:.0f}"
