"What the tests share: one thread, one small folder of rendered devices, one browser."

import matplotlib
import pytest
import torch
from in_browser import browser, lab, notebook, site, visit  # noqa: F401  (fixtures are found by name)

matplotlib.use("agg")
torch.set_num_threads(1)  # tiny models: a second thread waits more than it works


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "Rendered 256x256 devices: two for pre-training, two labelled ones (one image of each for calibration), one new."
    from aoi_ssl.synthetic import render_folder

    return render_folder(
        tmp_path_factory.mktemp("rendered") / "devices",
        devices=2,
        pretrain_devices=2,
        new_devices=1,
        images=4,
        calibration=1,
        size=256,
        progress=False,
    )
