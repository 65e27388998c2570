"The hierarchical encoder: token order, any size, spatial order, its own masking, resume."

import inspect
import os
import re
import signal
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import HieraForPreTraining, HieraModel

from aoi_ssl.augment import Augment
from aoi_ssl.core import AoiError, step_seed
from aoi_ssl.crops import store_images
from aoi_ssl.data import channel_stats, load_folder
from aoi_ssl.encoder import Encoder, quiet, sincos_positions
from aoi_ssl.hiera import HieraEncoder, hiera_config, new_hiera, pretrain_hiera, stage_outputs, unrolled_order
from aoi_ssl.pretrain import base_rate, decay_groups, masked_batches, pretrain

SMALL = {"encoder": "hiera-nano", "crop": 64, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from aoi_ssl.synthetic import render_folder

    path = tmp_path_factory.mktemp("hiera") / "parts"
    render_folder(path, devices=0, new_devices=0, pretrain_devices=3, images=3, size=192, progress=False)
    return load_folder(path)["pretrain"]


# --- order ---


@pytest.mark.parametrize(("rows", "columns", "levels"), [(4, 4, 2), (8, 4, 2), (8, 24, 3), (3, 5, 0)])
def test_the_order_is_that_in_which_pooling_is_a_maximum_over_an_axis(rows, columns, levels):
    values = torch.rand(rows * columns, generator=torch.Generator().manual_seed(0))
    tokens, grid = values[unrolled_order(rows, columns, levels)], values.view(1, rows, columns)
    assert sorted(unrolled_order(rows, columns, levels).tolist()) == list(range(rows * columns))
    for level in range(1, levels + 1):
        tokens, grid = tokens.view(4, -1).amax(0), F.max_pool2d(grid, 2)
        assert torch.equal(tokens, grid.flatten()[unrolled_order(rows >> level, columns >> level, levels - level)])


def test_stages_are_those_of_transformers_where_it_has_an_order():
    hiera = new_hiera(hiera_config("hiera-nano", image_size=64)).eval()
    pixels = torch.randn(2, 2, 64, 64)
    with torch.no_grad():
        ours, theirs = stage_outputs(hiera, pixels), hiera(pixels, output_hidden_states=True).reshaped_hidden_states[1:]
    assert [m.shape[1:] for m in ours] == [(16, 16, 16), (8, 8, 32), (4, 4, 64)]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, F.layer_norm(b, b.shape[-1:]), atol=1e-5)


def test_the_early_stages_never_leave_their_mask_unit():
    "In an image of 96 x 160 a change in the middle of a unit stays there in the first two stages."
    hiera = new_hiera(hiera_config("hiera-nano", image_size=64)).eval()
    plain = torch.randn(1, 2, 96, 160)
    changed = plain.clone()
    changed[:, :, 39:41, 71:73] += 1.0  # the middle of the unit in row 2, column 4
    with torch.no_grad():
        pairs = list(zip(stage_outputs(hiera, plain), stage_outputs(hiera, changed), strict=True))
    for stage, (a, b) in enumerate(pairs):
        moved = (a - b).abs().amax(-1)[0] > 1e-6
        inside = torch.zeros_like(moved)
        side = 4 >> stage
        inside[2 * side : 3 * side, 4 * side : 5 * side] = True
        if stage < 2:
            assert moved.any() and not (moved & ~inside).any()
        else:
            assert moved.float().mean() > 0.9, "the last stage sees everything"


# --- initial weights ---


def test_positions_are_fixed_and_tokens_are_drawn():
    model = new_hiera(hiera_config("hiera-nano", image_size=64), model=HieraForPreTraining)
    tables = {"hiera.embeddings.position_embeddings": (16, 16), "decoder.decoder_position_embeddings": (4, 128)}
    for name, (side, dim) in tables.items():
        table = model.get_parameter(name)
        assert torch.equal(table, sincos_positions(side, dim)[:, 1:]) and not table.requires_grad
    assert model.decoder.mask_token.std() > 0.01
    trained = {id(p) for group in decay_groups(model, weight_decay=0.05) for p in group["params"]}
    fixed = {name for name, p in model.named_parameters() if id(p) not in trained}
    assert fixed == set(tables)


def test_learnt_positions_would_learn_less(images):
    "On a task that needs positions: every patch of a fixed picture."
    pixels = (images[0]["image"][None, :, 32:160, 32:160].expand(4, -1, -1, -1) - 0.4) / 0.2

    def last_loss(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        torch.manual_seed(0)
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(pixels, noise=torch.rand(4, 64)).loss
            loss.backward()
            optimizer.step()
        return loss.item()

    config = hiera_config("hiera-nano", image_size=128)
    torch.manual_seed(0)
    theirs = HieraForPreTraining(config)
    ours, drawn = last_loss(new_hiera(config, model=HieraForPreTraining)), last_loss(theirs)
    assert ours < 0.8 * drawn, (ours, drawn)


def test_one_seed_one_set_of_weights():
    state = torch.get_rng_state()
    a, b, c = (HieraEncoder("hiera-nano", image_size=64, seed=s).fingerprint() for s in (0, 0, 1))
    assert a == b != c and torch.equal(state, torch.get_rng_state())


# --- the encoder ---


@pytest.mark.parametrize(
    ("stages", "patch", "dim"), [((3,), 16, 64), ((2, 3), 8, 96), ((2,), 8, 32), ((1, 2, 3), 4, 112)]
)
@pytest.mark.parametrize("size", [(64, 64), (100, 70), (20, 130), (5, 5)])
def test_any_size(stages, patch, dim, size):
    encoder = HieraEncoder("hiera-nano", image_size=64, stages=stages)
    assert encoder.patch_size == patch and encoder.dim == dim
    grid = encoder.encode(torch.rand(2, 2, *size))
    assert grid.shape == (2, -(-size[0] // patch), -(-size[1] // patch), dim) and grid.isfinite().all()


def test_coarse_embeddings_stand_beside_the_fine_ones_they_were_pooled_from():
    encoder, pixels = HieraEncoder("hiera-nano", image_size=64), torch.randn(1, 2, 64, 96)
    grid, (_, second, third) = encoder.embed(pixels), stage_outputs(encoder.hiera, pixels)
    assert torch.equal(grid[..., :32], second)
    assert all(torch.equal(grid[:, y::2, x::2, 32:], third) for y in (0, 1) for x in (0, 1))


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (11, 7)])
def test_a_patch_that_changes_moves_its_own_embedding_most(place):
    encoder, (y, x) = HieraEncoder("hiera-nano", image_size=64), place
    plain = torch.full((1, 2, 96, 64), 0.5)
    changed = plain.clone()
    changed[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = torch.rand(
        1, 2, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    moved = (encoder.encode(changed) - encoder.encode(plain)).norm(dim=-1)[0]
    assert divmod(moved.argmax().item(), 8) == place


def test_a_saved_encoder_is_the_same(tmp_path):
    encoder = HieraEncoder("hiera-nano", image_size=64, mean=[0.4, 0.5], std=[0.1, 0.2], stages=(3,))
    encoder.save_pretrained(tmp_path / "encoder")
    again = Encoder.from_pretrained(tmp_path / "encoder", channels=2)
    x = torch.rand(1, 2, 80, 70)
    assert isinstance(again, HieraEncoder) and again.stages == [3] and torch.equal(again.encode(x), encoder.encode(x))
    assert again.fingerprint() == encoder.fingerprint() and not again.hiera.embeddings.position_embeddings.requires_grad
    with quiet():
        HieraModel.from_pretrained(tmp_path / "encoder")


def test_it_opens_where_nobody_imported_this_module(tmp_path, monkeypatch):
    HieraEncoder("hiera-nano", image_size=64).save_pretrained(tmp_path / "encoder")
    monkeypatch.delitem(Encoder.kinds, "hiera")
    monkeypatch.delitem(sys.modules, "aoi_ssl.hiera")
    assert Encoder.from_pretrained(tmp_path / "encoder").kind == "hiera"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": ()}, r"stages is \[\]"),
        ({"stages": (3, 2)}, "rising numbers from 1 to 3"),
        ({"stages": (4,)}, "rising numbers from 1 to 3"),
        ({"preset": "tiny"}, "no encoder preset 'tiny'; one of hiera-nano"),
        ({"image_size": 100}, "100 is no multiple of the mask unit, 16 pixels. Use 96"),
    ],
)
def test_wrong_encoders_are_refused(wrong, message):
    with pytest.raises(AoiError, match=message):
        HieraEncoder(**({"preset": "hiera-nano", "image_size": 64} | wrong))


# --- training ---


def test_it_learns(images):
    history = pretrain_hiera(images, **(SMALL | {"batch_size": 8}), budget="60 steps").history
    assert history.loss.head(5).mean() > 0.98 and history.loss.tail(10).mean() < history.loss.head(5).mean() - 0.03


def test_hidden_units_are_not_seen():
    "Pictures that differ only where units are hidden are drawn alike there."
    mae = new_hiera(hiera_config("hiera-nano", image_size=64), model=HieraForPreTraining).eval()
    pixels, noise = torch.randn(2, 2, 64, 64), torch.rand(2, 16)
    with torch.no_grad():
        out = mae(pixels, noise=noise)
        hidden = (~out.bool_masked_pos).view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
        other = mae(torch.where(hidden, pixels + 3.0, pixels), noise=noise)
    assert (~out.bool_masked_pos).sum(1).tolist() == [10, 10] and torch.allclose(out.logits, other.logits, atol=1e-5)


def stop_at(step):
    class Impatient(Augment):
        def __call__(self, *args, seed, **options):
            if seed == step_seed(0, step, 1):
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*args, seed=seed, **options)

    return Impatient()


def test_ctrl_c_saves_and_the_resumed_run_is_the_unbroken_one(images, tmp_path):
    out, options = tmp_path / "encoder", SMALL | {"budget": "6 steps"}
    whole = pretrain_hiera(images, **options, stages=(3,))
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        pretrain_hiera(images, out, augment=stop_at(3), **options)
    with pytest.raises(AoiError, match="Resume with the same settings"):
        pretrain_hiera(images, out, resume=True, **(options | {"mask_ratio": 0.7}))
    resumed = pretrain_hiera(images, out, resume=True, **options)
    assert resumed.history.loss.equals(whole.history.loss), (
        "and training does not depend on the stages that are handed on"
    )
    for a, b in zip(resumed.mae.parameters(), whole.mae.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]
    mean, std = channel_stats(images)
    again = Encoder.from_pretrained(out)
    assert torch.allclose(again.mean, mean) and torch.allclose(again.std, std)
    assert again.fingerprint() == resumed.encoder.fingerprint()


def test_held_out_images_judge_it_and_patience_ends_it(images, capsys):
    "Under fixed masks of mask units: the loss that transformers has for the same pixels and the same noise."
    seen, held_out = images.select(range(6)), images.select(range(6, 9))
    options = SMALL | {"budget": "40 steps", "base_lr": 1.0, "progress": True}
    result = pretrain_hiera(seen, **options, validation=held_out, patience=1)
    judged = result.history.validation_loss.dropna()
    assert 2 <= len(judged) < 10 and len(result.history) < 40 and judged.iloc[-1] > judged.min()
    units = HieraEncoder(result.mae.hiera, mean=result.encoder.mean, std=result.encoder.std, stages=(3,))
    at = masked_batches(store_images(held_out, cell=64), units, size=64, batch_size=4)
    with torch.no_grad():
        mean = sum(result.mae(at(i)["pixels"], noise=at(i)["noise"]).loss.item() for i in range(4)) / 4
    assert mean == pytest.approx(judged.min(), rel=1e-5), "the weights that were best are those that come back"
    assert re.search(r"About \d+ images a second: 40 steps of 4, \d+\.\d epochs", capsys.readouterr().out)
    with pytest.raises(AoiError, match="nothing to validate on"):
        pretrain_hiera(seen, **options, patience=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": 100}, "no multiple of the mask unit"),
        ({"crop": 0}, "no multiple of the mask unit"),
        ({"crop": 320}, "smaller than a crop of 320"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"encoder": "tiny"}, "no encoder preset 'tiny'"),
        ({"budget": "soon"}, "no budget"),
        ({"base_lr": float("nan")}, "base_lr is nan; a finite number above 0"),
        ({"base_lr": -1e-3}, "base_lr is -0.001"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; a finite number from 0"),
        ({"warmup": 2.0}, "warmup is 2.0; a finite number from 0 to 1"),
        ({"report_to": "paper"}, "report_to is 'paper'"),
    ],
)
def test_wrong_plans_are_refused_before_an_image_is_read(images, wrong, message, monkeypatch):
    monkeypatch.setattr("aoi_ssl.data.read_native", lambda *a, **k: pytest.fail("an image was read"))
    with pytest.raises(AoiError, match=message):
        pretrain_hiera(images, **(SMALL | {"budget": "1 steps"} | wrong))


def test_the_options_that_pretrain_has_mean_the_same_here():
    theirs, ours = (inspect.signature(f).parameters for f in (pretrain, pretrain_hiera))
    for name in set(theirs) & set(ours) - {"encoder", "mask_ratio", "base_lr"}:
        assert theirs[name].default == ours[name].default, name
    assert ours["base_lr"].default == base_rate(None, adapting=False)  # it has no weights to go on from
