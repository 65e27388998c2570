"Embeddings in spatial order at any size, correct initialisation, one folder in and out, clear refusals."

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    HieraConfig,
    HieraModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from aoi_ssl.core import AoiError
from aoi_ssl.encoder import (
    PRESETS,
    BackboneEncoder,
    Encoder,
    PixelEncoder,
    ViTEncoder,
    adapt_channels,
    block_outputs,
    check_images,
    initialise_mae,
    mae_config,
    new_vit,
    pad_to,
    quiet,
    sincos_positions,
)

SIZES = [(64, 64), (33, 100), (5, 40), (3, 7), (130, 20), (16, 16)]


def images(height, width, channels=2, count=1, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vit():
    return ViTEncoder("nano", image_size=64, mean=[0.3, 0.6], std=[0.2, 0.3])


# --- initialisation (design, section 5) ---


def test_a_model_from_a_config_has_zero_positions_and_ours_has_not():
    config = mae_config("nano", image_size=64)
    built = ViTMAEForPreTraining(config)
    assert built.vit.embeddings.position_embeddings.abs().sum() == 0, "transformers mended this: drop initialise_mae"
    assert built.decoder.decoder_pos_embed.abs().sum() == 0
    ours = new_vit(config, model=ViTMAEForPreTraining)
    for positions in ours.vit.embeddings.position_embeddings, ours.decoder.decoder_pos_embed:
        assert not positions.requires_grad
        assert len(positions[0].unique(dim=0)) == 17  # all 16 positions differ from each other and from the cls token's
    for token in ours.vit.embeddings.cls_token, ours.decoder.mask_token:
        assert 0.01 < token.std() < 0.03 and token.requires_grad


def test_positions_by_hand():
    table = sincos_positions(3, 8)[0]
    angle = torch.tensor([2.0, 2.0 / 100])  # column 2, frequencies 1 and 10000 ** -0.5
    row = torch.tensor([1.0, 1.0 / 100])
    expected = torch.cat([angle.sin(), angle.cos(), row.sin(), row.cos()])
    assert torch.allclose(table[1 + 1 * 3 + 2], expected, atol=1e-6) and table[0].abs().sum() == 0


def test_initialisation_is_that_of_transformers_own_function():
    ours = new_vit(mae_config("tiny"))
    positions = ours.embeddings.position_embeddings.detach().clone()
    ours.embeddings.patch_embeddings.projection._is_hf_initialized = False
    ours.embeddings.initialize_weights()
    assert torch.allclose(ours.embeddings.position_embeddings, positions, atol=1e-6)


def test_seeds_and_the_callers_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (ViTEncoder("nano", image_size=64, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


@pytest.mark.parametrize("patch_size", [16, 8])
@pytest.mark.parametrize(("preset", "width", "heads"), [("tiny", 192, 3), ("small", 384, 6)])
def test_presets(preset, width, heads, patch_size):
    config = mae_config(preset, patch_size=patch_size)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, 6, heads)
    assert config.patch_size == patch_size and preset in PRESETS


# --- spatial order ---


def test_same_numbers_as_vitmae_when_nothing_is_hidden(vit):
    x = images(64, 96, count=2)
    vit.vit.config.mask_ratio = 0.0
    with torch.no_grad():
        noise = torch.arange(24.0).expand(2, -1)
        out = vit.vit(vit.normalise(x), noise=noise, interpolate_pos_encoding=True, output_hidden_states=True)
    vit.vit.config.mask_ratio = 0.7
    assert torch.allclose(vit.encode(x).flatten(1, 2), out.last_hidden_state[:, 1:], atol=1e-5)
    first, second = block_outputs(vit.vit, vit.normalise(x), [1, 2])
    assert torch.allclose(first.flatten(1, 2), vit.vit.layernorm(out.hidden_states[1][:, 1:]), atol=1e-5)


def test_encoding_is_not_random(vit):
    x = images(64, 64)
    assert torch.equal(vit.encode(x), vit.encode(x))


def test_moving_one_patch_of_the_image_moves_one_embedding():
    encoder = ViTEncoder("nano", image_size=64)
    with torch.no_grad():  # blocks that add nothing: each embedding depends on its own patch alone
        for block in encoder.vit.layers:
            for last in block.attention.o_proj, block.mlp.fc2:
                last.weight.zero_(), last.bias.zero_()
    for one in encoder, PixelEncoder():
        x = images(64, 96)
        moved = x.clone()
        moved[..., 16:32, 48:64] = 1 - moved[..., 16:32, 48:64]
        changed = (one.encode(x) != one.encode(moved)).any(-1)[0]
        assert changed.nonzero().tolist() == [[1, 3]]


def test_pixels_of_a_patch_are_its_own():
    x = images(40, 70, count=2)
    grid = PixelEncoder(mean=[0, 0], std=[1, 1]).encode(x)
    assert grid.shape == (2, 3, 5, 512)
    assert torch.equal(grid[1, 1, 2].view(2, 16, 16), x[1, :, 16:32, 32:48])


# --- any size ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [16, 8])
def test_any_size_keeps_its_border(size, patch_size):
    for encoder in ViTEncoder("nano", patch_size=patch_size, image_size=64), PixelEncoder(patch_size=patch_size):
        grid = encoder.encode(images(*size))
        assert grid.shape == (1, -(-size[0] // patch_size), -(-size[1] // patch_size), encoder.dim)
        assert grid.isfinite().all()


def test_the_last_rows_and_columns_count():
    x = images(33, 50)
    border = x.clone()
    border[..., -1, -1] = 1 - border[..., -1, -1]
    a, b = (PixelEncoder().encode(v) for v in (x, border))
    assert (a != b).any(-1)[0].nonzero().tolist() == [[2, 3]]


def test_padding_mirrors_at_any_size():
    row = torch.arange(3.0).view(1, 1, 1, 3)
    assert pad_to(row, 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
    assert pad_to(row, 8)[0, 0, 7].tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
    assert pad_to(row[..., :1], 4).unique().tolist() == [0]


# --- layers, normalisation, modes ---


def test_layers_are_concatenated_in_order():
    x = images(48, 48)
    both, first, last = (ViTEncoder("nano", image_size=64, layers=n) for n in ((1, 2), (1,), None))
    assert (both.dim, first.dim, last.dim) == (96, 48, 48) and last.layers == [2]
    assert torch.equal(both.encode(x), torch.cat([first.encode(x), last.encode(x)], dim=-1))
    for wrong in (), (0,), (3,), (2, 1), (1, 1):
        with pytest.raises(AoiError, match="rising block numbers from 1 to 2"):
            ViTEncoder("nano", image_size=64, layers=wrong)


def test_normalisation_is_inside_and_once():
    x = images(32, 32)
    plain, ours = PixelEncoder(mean=[0, 0], std=[1, 1]), PixelEncoder(mean=[0.25, 0.5], std=[0.5, 0.125])
    expected = (x - torch.tensor([0.25, 0.5]).view(2, 1, 1)) / torch.tensor([0.5, 0.125]).view(2, 1, 1)
    assert torch.allclose(ours.encode(x).permute(0, 3, 1, 2), F.pixel_unshuffle(expected, 16))
    assert torch.allclose(ours.denormalise(ours.normalise(x)), x, atol=1e-6)
    assert torch.equal(plain.encode(x).permute(0, 3, 1, 2), F.pixel_unshuffle(x, 16))
    for wrong in {"mean": [0.5]}, {"std": [0.1, 0.0]}, {"std": [0.1, float("nan")]}, {"mean": [0.5] * 3}:
        with pytest.raises(AoiError, match="2 finite numbers"):
            PixelEncoder(**wrong)


def test_embeddings_are_ordinary_tensors_without_gradients_and_the_mode_is_left(vit):
    vit.train()
    grid = vit.encode(images(32, 32))
    assert vit.training and vit.vit.training
    vit.eval()
    assert not grid.requires_grad and not grid.is_inference()
    (grid.requires_grad_() ** 2).sum().backward()  # usable in a training step
    assert vit.embed(vit.normalise(images(32, 32))).requires_grad


# --- what is refused (design, section 9; bad input) ---


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (255 * torch.rand(1, 2, 32, 32), "Divide 8-bit values"),  # divided by 255 nowhere
        (torch.rand(1, 2, 32, 32) - 0.5, "do not normalise"),  # normalised outside
        (torch.full((1, 2, 32, 32), torch.nan), "nan"),
        (torch.randint(2, (1, 2, 32, 32)), "float tensor"),
        (torch.randint(255, (1, 2, 32, 32), dtype=torch.uint8), "float tensor"),
        (torch.rand(1, 3, 32, 32), "3 channels; this model was made for 2"),
        (torch.rand(2, 32, 32), r"images?\[None\]"),
        (torch.rand(1, 2, 0, 32), "no empty side"),
    ],
)
def test_wrong_images_are_refused(vit, batch, message):
    for encoder in vit, PixelEncoder():
        with pytest.raises(AoiError, match=message):
            encoder.encode(batch)
    with pytest.raises(AoiError, match=message):
        check_images(batch, 2)


def test_rounding_just_above_one_is_no_error(vit):
    vit.encode(torch.full((1, 2, 16, 16), 1 + 1e-6))


def test_wrong_settings_are_refused():
    with pytest.raises(AoiError, match="'huge'.*tiny"):
        ViTEncoder("huge")
    with pytest.raises(AoiError, match="500 is no multiple of the patch size 16. Use 496"):
        ViTEncoder("nano", image_size=500)
    with pytest.raises(AoiError, match="mask_ratio"):
        mae_config("nano", mask_ratio=1.0)
    with pytest.raises(AoiError, match="decoder_width is 30; a multiple of 4"):
        mae_config("nano", decoder_width=30)


# --- folders ---

THREE = {"channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTEncoder("nano", patch_size=8, image_size=32, layers=(1, 2), **THREE),
        lambda: PixelEncoder(patch_size=8, **THREE),
    ],
)
def test_save_and_load(tmp_path, make):
    encoder, x = make(), images(40, 30, channels=3)
    encoder.save_pretrained(tmp_path / "encoder")
    same = Encoder.from_pretrained(tmp_path / "encoder", channels=3)
    assert type(same) is type(encoder) and not same.training
    assert torch.equal(same.encode(x), encoder.encode(x)) and same.dim == encoder.dim
    assert same.fingerprint() == encoder.fingerprint() and torch.equal(same.std, encoder.std)
    with pytest.raises(AoiError, match="made for 3 channels; the images have 2"):
        Encoder.from_pretrained(tmp_path / "encoder", channels=2)
    with pytest.raises(AoiError, match="not empty"):
        encoder.save_pretrained(tmp_path / "encoder")
    encoder.save_pretrained(tmp_path / "encoder", overwrite=True)


def test_positions_stay_frozen_after_loading(tmp_path, vit):
    vit.save_pretrained(tmp_path / "encoder")
    with quiet():
        theirs = ViTMAEModel.from_pretrained(tmp_path / "encoder")
    assert theirs.embeddings.position_embeddings.requires_grad, "transformers mended this: drop freeze_positions"
    assert not Encoder.from_pretrained(tmp_path / "encoder").vit.embeddings.position_embeddings.requires_grad


def test_broken_folders_are_refused(tmp_path, vit):
    with pytest.raises(AoiError, match="no folder with an encoder.json"):
        Encoder.from_pretrained(tmp_path / "nowhere")
    for name in "torn", "swapped", "foreign", "restated":
        vit.save_pretrained(tmp_path / name)
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(AoiError, match="Copy the folder again"):
        Encoder.from_pretrained(tmp_path / "torn")
    ViTEncoder("nano", image_size=64, seed=9).save_pretrained(tmp_path / "other")
    (tmp_path / "swapped" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(AoiError, match="not those that its encoder.json describes"):
        Encoder.from_pretrained(tmp_path / "swapped")
    manifest = json.loads((tmp_path / "foreign" / "encoder.json").read_text())
    (tmp_path / "foreign" / "encoder.json").write_text(json.dumps(manifest | {"kind": "dino"}))
    with pytest.raises(AoiError, match="kind 'dino'"):
        Encoder.from_pretrained(tmp_path / "foreign")
    with pytest.raises(AoiError, match="'vit'; pixels was expected"):
        PixelEncoder.from_pretrained(tmp_path / "other")
    (tmp_path / "restated" / "encoder.json").write_text(json.dumps(manifest | {"mean": [0.5, 0.5]}))
    with pytest.raises(AoiError, match="not those that its encoder.json describes"):
        Encoder.from_pretrained(tmp_path / "restated")


def test_a_full_disk_leaves_the_old_folder(tmp_path, vit, monkeypatch):
    vit.save_pretrained(tmp_path / "encoder")
    before = {p.name: p.read_bytes() for p in (tmp_path / "encoder").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ViTMAEModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        vit.save_pretrained(tmp_path / "encoder", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "encoder").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


def test_fingerprint_notices_one_weight_and_one_setting():
    base = ViTEncoder("nano", image_size=64)
    changed = ViTEncoder("nano", image_size=64)
    with torch.no_grad():
        changed.vit.layers[1].mlp.fc2.bias[0] += 1e-6
    prints = {e.fingerprint() for e in (base, changed, ViTEncoder("nano", image_size=64, layers=(1,)))}
    prints |= {ViTEncoder("nano", image_size=64, std=[0.25, 0.26]).fingerprint()}
    assert len(prints) == 4


# --- backbones ---

FLAT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGES = {"depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "layer_type": "basic"}
BACKBONES = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**FLAT, image_size=56, patch_size=14)),
    "vit": lambda: ViTModel(ViTConfig(**FLAT, intermediate_size=48, image_size=64, patch_size=16)),
    "hiera": lambda: HieraModel(HieraConfig(**STAGES, embed_dim=16, image_size=[64, 64], num_heads=[1, 1, 2, 2])),
    "resnet": lambda: ResNetModel(ResNetConfig(**STAGES, **RESNET)),
    "vit_mae": lambda: new_vit(mae_config("nano", channels=3, image_size=64)),
}


@pytest.fixture(scope="module", params=BACKBONES)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / request.param
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        BACKBONES[request.param]().save_pretrained(path)
    return path


def test_backbones_any_size_and_round_trip(saved, tmp_path):
    encoder = BackboneEncoder(saved, channels=2, mean=[0.4, 0.5], std=[0.2, 0.3])
    patch = encoder.patch_size
    assert patch == (14 if saved.name == "dinov2" else 16)
    for size in (64, 64), (50, 90), (5, 40):
        assert encoder.encode(images(*size)).shape == (1, -(-size[0] // patch), -(-size[1] // patch), encoder.dim)
    encoder.save_pretrained(tmp_path / "encoder")
    same, x = Encoder.from_pretrained(tmp_path / "encoder"), images(70, 90)
    assert torch.equal(same.encode(x), encoder.encode(x)) and same.fingerprint() == encoder.fingerprint()
    with pytest.raises(AoiError, match="1 channels; this model was made for 2"):
        encoder.encode(images(32, 32, channels=1))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_equal_lights_give_what_a_grey_photograph_gives(saved, channels):
    colour = BackboneEncoder(saved, channels=3, mean=[0.5] * 3, std=[0.25] * 3)
    lights = BackboneEncoder(saved, channels=channels, mean=[0.5] * channels, std=[0.25] * channels)
    grey = images(64, 64, channels=1)
    a, b = colour.encode(grey.expand(-1, 3, -1, -1)), lights.encode(grey.expand(-1, channels, -1, -1))
    assert torch.allclose(a, b, atol=1e-4)


def test_backbone_embeddings_lie_where_their_patches_lie(saved):
    encoder = BackboneEncoder(saved)
    dark = torch.full((1, 2, 128, 192), 0.2)
    lit = dark.clone()
    lit[..., 80:96, 128:144] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    moved = (encoder.encode(lit) - encoder.encode(dark)).norm(dim=-1)[0]
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    centre = (torch.tensor([row, column]) + 0.5) * encoder.patch_size
    assert (centre - torch.tensor([88, 136])).abs().max() <= encoder.patch_size


def test_what_is_no_vision_backbone_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with quiet():
        BertModel(BertConfig(vocab_size=20, **size)).save_pretrained(tmp_path / "bert")
    with pytest.raises(AoiError, match="BertModel; a vision model"):
        BackboneEncoder(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AoiError, match="cannot be opened"):
        BackboneEncoder(tmp_path / "empty")


def test_adapting_keeps_three_channels_as_they_are():
    model = BACKBONES["resnet"]()
    before = model.embedder.embedder.convolution.weight.clone()
    adapt_channels(model, 3)
    assert torch.equal(before, model.embedder.embedder.convolution.weight)
    adapt_channels(model, 2)
    assert torch.allclose(model.embedder.embedder.convolution.weight.sum(1), before.sum(1), atol=1e-6)


def test_initialise_mae_is_repeatable():
    a, b = (ViTMAEModel(mae_config("nano", image_size=64)) for _ in range(2))
    for model in a, b:
        initialise_mae(model, seed=3)
    assert torch.equal(a.embeddings.cls_token, b.embeddings.cls_token)
