"Weights of the package: a byte a weight, found by name, and better than what they must beat."

import inspect
import json
from pathlib import Path

import pytest
import torch
from from_tools import load_tool, needs_tools
from safetensors.torch import load_file

import aoi_ssl
from aoi_ssl.core import AoiError
from aoi_ssl.encoder import Encoder
from aoi_ssl.features import compared_layers
from aoi_ssl.pretrain import load_pretrained
from aoi_ssl.weights import PACKED, pack_weights, resolve_encoder, shipped_encoders, unpack_weights

NAMES = ("aoi-contrastive-tiny", "aoi-mae-small", "aoi-mae-tiny")


def test_a_row_is_scaled_by_its_largest_weight():
    weights = {"w": torch.zeros(2, 1024)}
    weights["w"][0, :3] = torch.tensor([1.27, 0.01, -0.0149])
    packed = pack_weights(weights)
    assert packed["w"].dtype == torch.int8 and packed["w"][0, :3].tolist() == [127, 1, -1]
    assert torch.allclose(unpack_weights(packed)["w"][0, :3], torch.tensor([1.27, 0.01, -0.01]))
    assert unpack_weights(packed)["w"][1].tolist() == [0.0] * 1024  # a row of zeros


def test_vectors_and_small_matrices_stay_exact():
    weights = {"bias": torch.rand(5000), "small": torch.rand(3, 5)}
    again = unpack_weights(pack_weights(weights))
    assert all(torch.equal(again[name], weights[name]) for name in weights) and set(again) == set(weights)


def test_the_shipped_encoders_are_there_and_small():
    assert tuple(shipped_encoders()) == NAMES
    sizes = [f.stat().st_size for folder in shipped_encoders().values() for f in folder.iterdir()]
    assert sum(sizes) < 25e6


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_encoder_is_whole(name):
    encoder = Encoder.from_pretrained(name, channels=2)
    folder = shipped_encoders()[name]
    about = json.loads((folder / "encoder.json").read_text())
    assert encoder.fingerprint() == about["fingerprint"] and encoder.patch_size == 16
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("## Data", "## Recipe", "## Scores", "## Limits", "tools/make_weights.py"))
    positions = encoder.vit.embeddings.position_embeddings
    assert not positions.requires_grad and positions.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if "mae" in name])
def test_a_shipped_autoencoder_has_its_decoder(name):
    assert load_pretrained(name).mae.decoder.decoder_pos_embed.abs().sum() > 0


def test_the_encoder_that_compares_says_by_which_block():
    assert compared_layers(Encoder.from_pretrained("aoi-contrastive-tiny")) == [6]
    assert all(compared_layers(Encoder.from_pretrained(name)) is None for name in NAMES if "mae" in name)


def test_a_shipped_encoder_has_learned_to_draw():
    "Its error on hidden patches of a device that it never saw is far below that of drawing their mean grey."
    from aoi_ssl.synthetic import render

    trained = load_pretrained("aoi-mae-tiny")
    image = torch.from_numpy(render(30_001, size=448).image)[None] / 255
    pixels = trained.encoder.normalise(image[..., :224, :224])
    noise = torch.rand(1, 196, generator=torch.Generator().manual_seed(0))
    assert trained.mae(pixels, noise=noise).loss < 0.6


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_encoder("aoi-mae-tiny") == shipped_encoders()["aoi-mae-tiny"]
    Encoder.from_pretrained("aoi-mae-tiny").save_pretrained(tmp_path / "aoi-mae-tiny")
    assert resolve_encoder("aoi-mae-tiny") == Path("aoi-mae-tiny")
    with pytest.raises(AoiError, match="aoi-mae-small, aoi-mae-tiny"):
        Encoder.from_pretrained("aoi-mae-huge")


def test_damaged_weights_are_refused(tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "copy"
    shutil.copytree(shipped_encoders()["aoi-mae-tiny"], folder)
    tensors = load_file(folder / PACKED)
    save_file({name: t for name, t in tensors.items() if not name.startswith("vit.layernorm")}, folder / PACKED)
    with pytest.raises(AoiError, match="lack layernorm"):
        Encoder.from_pretrained(folder)
    tensors["vit.layernorm.bias"] = tensors["vit.layernorm.bias"] + 1
    save_file(tensors, folder / PACKED)
    with pytest.raises(AoiError, match="not those that its encoder.json describes"):
        Encoder.from_pretrained(folder)


# --- how they are made ---


@needs_tools
def test_recipes_are_options_of_the_verbs_that_they_name():
    tool = load_tool("make_weights")
    for verb, options in tool.RECIPES.values():
        assert set(options) <= set(inspect.signature(getattr(aoi_ssl, verb)).parameters)
    assert set(tool.RECIPES) >= set(shipped_encoders())


@needs_tools
def test_twins_lie_where_their_pictures_lie_and_do_not_drift():
    tool = load_tool("make_weights")
    for device, image in (20_000, 0), (21_003, 5):
        drifted, twin = tool.drifted(device, image), tool.undrifted(device, image)
        assert (drifted.scale, drifted.rotation) == (twin.scale, twin.rotation) and drifted.light > 0
        assert twin.light == twin.focus == twin.material == 0


@needs_tools
def test_the_pictures_are_those_of_a_range_of_drift(tmp_path):
    from aoi_ssl.synthetic import render_folder

    tool = load_tool("make_weights")
    small = {"devices": 0, "new_devices": 0, "pretrain_devices": 1, "images": 2, "calibration": 0, "size": 64, "progress": False}
    for name, drift in {"range": (0, 1), "function": tool.drifted}.items():
        render_folder(tmp_path / name, drift=drift, **small)
    for path in (tmp_path / "range").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "function" / path.relative_to(tmp_path / "range")).read_bytes()
