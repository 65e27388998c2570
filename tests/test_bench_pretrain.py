"The benchmark of pre-training: the rival is a fair one, and the parts of a step add up."

import pytest
import torch
from from_tools import load_tool, needs_tools

from aoi_ssl.crops import store_images
from aoi_ssl.data import channel_stats, load_folder

pytestmark = needs_tools


@pytest.fixture(scope="module")
def tool():
    return load_tool("bench_pretrain")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    from aoi_ssl.synthetic import render_folder

    path = tmp_path_factory.mktemp("bench") / "parts"
    return render_folder(path, devices=0, new_devices=0, pretrain_devices=2, images=2, size=256, progress=False)


def test_decoding_each_time_gives_the_crops_of_decoding_once(tool, parts):
    images = load_folder(parts)["pretrain"]
    once, each = (store_images(images, cell=64, seed=3) for _ in range(2))
    tool.decode_each(each, images)
    for step in (0, 5):
        assert torch.equal(each.batch(step, 4, size=64), once.batch(step, 4, size=64))
    assert torch.equal(each.batch(5, 4, size=64, part=slice(2, 4)), once.batch(5, 4, size=64)[2:])


def test_the_rival_sees_every_image_normalised_and_never_twice_alike(tool, parts):
    images = load_folder(parts)["pretrain"]
    files = tool.Files(parts, *channel_stats(images))
    torch.manual_seed(0)
    first, again = files[1], files[1]
    assert len(files) == len(images) == 4 and first.shape == (2, tool.CROP, tool.CROP) and not torch.equal(first, again)
    many = torch.stack([files[i % 4] for i in range(24)])
    assert many.mean().abs() < 0.25 and 0.7 < many.std() < 1.3


def test_the_parts_of_a_step_add_up_and_the_warm_up_does_not_count(tool):
    watch = tool.Watch()
    watch.ends = [9.0, 10.0, 10.5, 11.0]  # two steps to warm up, two of half a second
    watch.spent = {"data": [7.0, 7.0, 0.1, 0.1], "forward": [7.0, 7.0, 0.2, 0.1], "optimiser": [0.0, 0.0, 0.05, 0.05]}
    parts = {"data_ms": 100.0, "forward_ms": 150.0, "optimiser_ms": 50.0, "backward and the rest_ms": 200.0}
    assert watch.table() == {"step_ms": 500.0} | parts
    watch.walls = [0.0, 5.0, 6.0, 7.0]  # on the wall one a second
    assert watch.on_the_wall() == tool.BATCH
