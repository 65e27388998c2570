"Masked autoencoding: learns, resumes bit for bit, keeps statistics, leaves no half-written folder."

import importlib
import inspect
import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTMAEForPreTraining

from aoi_ssl.augment import Augment
from aoi_ssl.core import AoiError, step_seed
from aoi_ssl.crops import store_images
from aoi_ssl.data import channel_stats, load_folder
from aoi_ssl.encoder import Encoder, PixelEncoder, ViTEncoder, mae_config, new_vit, quiet
from aoi_ssl.pretrain import (
    Pretrained,
    decay_groups,
    default_crop,
    held_out_loss,
    load_pretrained,
    masked_batches,
    masked_loss,
    pretrain,
    visible_statistics,
)

pretrain_module = importlib.import_module("aoi_ssl.pretrain")  # `aoi_ssl.pretrain` itself is the verb
ROOT = Path(__file__).resolve().parent.parent
SMALL = {"encoder": "nano", "crop": 64, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    from aoi_ssl.synthetic import render_folder

    path = tmp_path_factory.mktemp("pretrain") / "parts"
    return render_folder(path, devices=0, new_devices=0, pretrain_devices=3, images=3, size=256, progress=False)


@pytest.fixture(scope="module")
def images(rendered):
    return load_folder(rendered)["pretrain"]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "encoder"
    return pretrain(images, out, **SMALL, budget="12 steps", validation=images.select([0, 1])), out


def grey(folder, shape, two_lights, *more):
    "A folder of noise, an image for each shape."
    place = folder / "parts" / "acme" / "d1"
    place.mkdir(parents=True)
    for n, (height, width) in enumerate((shape, *more)):
        for light in range(1 + two_lights):
            noise = np.random.default_rng(light).integers(0, 256, (height, width), dtype=np.uint8)
            Image.fromarray(noise).save(place / f"im{n}_buffer{light}.png")
    return load_folder(folder / "parts")["unlabelled"]


def stop_at(step):
    class Impatient(Augment):
        def __call__(self, *args, seed, **options):
            if seed == step_seed(0, step, 1):
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*args, seed=seed, **options)

    return Impatient()


def test_the_defaults_are_the_papers():
    defaults = {n: p.default for n, p in inspect.signature(pretrain).parameters.items()}
    assert defaults["mask_ratio"] == 0.7 and defaults["norm_pix"] and defaults["augment"] is True
    assert defaults["weight_decay"] == 0.05 and pretrain_module._DRAWN == {"encoder": "tiny", "patch_size": 16, "decoder_width": 128}


def test_it_learns(images):
    history = pretrain(images, **(SMALL | {"batch_size": 8}), patch_size=8, budget="80 steps").history
    assert history.loss.head(10).mean() > 0.95 and history.loss.tail(10).mean() < 0.9


def test_zero_positions_would_learn_less(images):
    """The regression test of design section 5, on a task that needs positions: every patch of a fixed picture."""

    def last_loss(initialised):
        torch.manual_seed(0)
        config = mae_config("nano", image_size=64, patch_size=8)
        mae = new_vit(config, model=ViTMAEForPreTraining) if initialised else ViTMAEForPreTraining(config)
        pixels = images[0]["image"][None, :, 64:128, 64:128].expand(8, -1, -1, -1)
        optimizer = torch.optim.AdamW([p for p in mae.parameters() if p.requires_grad], lr=2e-3)
        for _ in range(40):
            optimizer.zero_grad()
            loss = mae(pixels).loss
            loss.backward()
            optimizer.step()
        return loss.item()

    assert last_loss(True) < 0.5 * last_loss(False)


def test_the_decoder_has_the_width_that_is_asked_for(images):
    mae = pretrain(images, **SMALL, decoder_width=32, budget="1 steps").mae
    assert mae.decoder.mask_token.shape[-1] == 32 and mae.decoder.decoder_layers[0].mlp.fc1.out_features == 128


def test_weight_decay_spares_norms_biases_and_tokens_and_misses_nothing():
    mae = new_vit(mae_config("nano", image_size=32), model=ViTMAEForPreTraining)
    names = {id(p): n for n, p in mae.named_parameters()}
    matrices, others = decay_groups(mae, weight_decay=0.05)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.05, 0)
    decayed, spared = ({names[id(p)] for p in g["params"]} for g in (matrices, others))
    assert not decayed & spared
    assert set(names.values()) - decayed - spared == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert all(n.endswith(".weight") and "norm" not in n for n in decayed)
    assert {"vit.embeddings.cls_token", "decoder.mask_token"} <= spared


# --- one seed, one result; killed and resumed ---


def test_one_seed_one_result(images):
    a, b, c = (pretrain(images, **SMALL, budget="3 steps", seed=s) for s in (0, 0, 1))
    assert a.encoder.fingerprint() == b.encoder.fingerprint() != c.encoder.fingerprint()
    assert a.history.loss.equals(b.history.loss) and not a.history.loss.equals(c.history.loss)


def test_ctrl_c_saves_and_the_resumed_run_is_the_unbroken_one(images, tmp_path):
    out, held_out = tmp_path / "runs" / "encoder", images.select([0])
    options = {**SMALL, "budget": "10 steps", "validation": held_out}
    whole = pretrain(images, **options)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        pretrain(images, out, augment=stop_at(5), **options)
    assert not out.exists() and (tmp_path / "runs" / "encoder.checkpoint").exists()
    with pytest.raises(AoiError, match="did not end. Pass resume=True"):
        pretrain(images, out, **options)
    with pytest.raises(AoiError, match="Resume with the same settings"):
        pretrain(images, out, resume=True, **(options | {"base_lr": 1e-3}))
    others = images.map(lambda row: {"stem": f"other_{row['stem']}"})
    with pytest.raises(AoiError, match="Resume with the same settings"):
        pretrain(others, out, resume=True, **options)
    with pytest.raises(AoiError, match="Resume with the same settings"):
        pretrain(images, out, resume=True, **(options | {"validation": images.select([1])}))
    resumed = pretrain(images, out, resume=True, **options)
    assert resumed.history.loss.equals(whole.history.loss)
    assert resumed.history.validation_loss.equals(whole.history.validation_loss)
    assert resumed.encoder.fingerprint() == whole.encoder.fingerprint()
    for a, b in zip(resumed.mae.parameters(), whole.mae.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["encoder"]


@pytest.mark.parametrize(("budget", "steps"), [("3 steps", 3), ("2 epochs", 72)])
def test_budgets(images, budget, steps):
    history = pretrain(images, **SMALL, budget=budget).history  # 9 images of 16 cells, batches of 4: 36 steps an epoch
    assert len(history) == steps and history.lr.iloc[-1] < 0.6 * history.lr.max()


def test_a_budget_in_seconds_anneals_to_its_end(images):
    history = pretrain(images, **SMALL, budget=2.0).history
    assert 1.9 < history.seconds.iloc[-1] < 6 and history.lr.iloc[-1] < 0.3 * history.lr.max()


# --- validation ---


def test_validation_is_never_augmented(images, monkeypatch):
    changed, call = [], Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda *a, **k: changed.append(1) or call(*a, **k))
    history = pretrain(images, **SMALL, budget="3 steps", augment=True, validation=images.select([0])).history
    assert len(changed) == 3 and history.validation_loss.notna().sum() >= 3


def test_validation_is_fixed(images):
    mae = new_vit(mae_config("nano", image_size=64), model=ViTMAEForPreTraining)
    at = masked_batches(store_images(images.select([0]), cell=64), ViTEncoder(mae.vit), size=64, batch_size=4)
    with torch.no_grad():
        judge = held_out_loss(masked_loss, at)
        a, b = judge(mae), judge(mae)
    assert a == b and a["score"] == -a["loss"]
    assert held_out_loss(masked_loss, None) is None


def test_validation_loss_is_in_the_history(trained):
    result, _ = trained
    validated = result.history.validation_loss.dropna()
    assert len(validated) >= 5 and (validated < 2).all()


# --- statistics and folder ---


def test_statistics_are_those_of_the_training_images_and_travel(images, trained):
    result, out = trained
    mean, std = channel_stats(images)
    for encoder in result.encoder, Encoder.from_pretrained(out):
        assert torch.allclose(encoder.mean, mean) and torch.allclose(encoder.std, std)


def test_the_folder_opens_everywhere(trained):
    result, out = trained
    x = torch.rand(1, 2, 80, 70)
    again, encoder = load_pretrained(out), Encoder.from_pretrained(out)
    with quiet():
        theirs = ViTMAEForPreTraining.from_pretrained(out)
    files = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert files == ["config.json", "encoder.json", "history.csv", "model.safetensors", "snapshots"]
    for one in encoder, again.encoder:
        assert torch.equal(one.encode(x), result.encoder.encode(x))
    assert again.encoder.vit is again.mae.vit and theirs.config.mask_ratio == 0.7 and theirs.config.norm_pix_loss
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), result.mae.parameters(), strict=True))
    assert not again.mae.vit.embeddings.position_embeddings.requires_grad
    assert not again.mae.decoder.decoder_pos_embed.requires_grad
    pd.testing.assert_frame_equal(again.history, result.history, check_dtype=False)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    PixelEncoder().save_pretrained(tmp_path / "pixels")
    ViTEncoder("nano", image_size=32).save_pretrained(tmp_path / "vit")
    for name in "pixels", "vit":
        with pytest.raises(AoiError, match="no autoencoder"):
            load_pretrained(tmp_path / name)


def test_a_full_disk_at_the_end_keeps_the_checkpoint(images, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Pretrained, "save", full)
        with pytest.raises(OSError, match="No space"):
            pretrain(images, tmp_path / "encoder", **SMALL, budget="3 steps")
    assert not (tmp_path / "encoder").exists()
    result = pretrain(images, tmp_path / "encoder", **SMALL, budget="3 steps", resume=True)
    assert len(result.history) == 3 and (tmp_path / "encoder" / "model.safetensors").exists()


def test_start_from(images, trained, tmp_path):
    result, out = trained
    still = {**SMALL, "budget": "1 steps", "base_lr": 1e-12, "weight_decay": 0.0}
    other = {"encoder": None, "crop": 96}
    more = pretrain(images, **(still | other), start_from=out)
    assert more.mae.config.hidden_size == 48 and more.mae.config.image_size == 96
    for wrong, has in ({"encoder": "tiny"}, "'nano'"), ({"patch_size": 8}, 16), ({"decoder_width": 64}, 128):
        (name, value), = wrong.items()
        with pytest.raises(AoiError, match=rf"{name} is {value!r}, but the weights of .* have {name} {has}.*Leave {name} out"):
            pretrain(images, **(still | wrong), start_from=out)
    same = pretrain(images, **still, patch_size=16, decoder_width=128, start_from=out)
    assert same.mae.config.hidden_size == 48, "what agrees may be said"
    assert torch.allclose(more.mae.vit.layers[0].mlp.fc1.weight, result.mae.vit.layers[0].mlp.fc1.weight, atol=1e-6)
    assert torch.allclose(more.mae.decoder.mask_token, result.mae.decoder.mask_token, atol=1e-6)
    assert more.mae.vit.embeddings.position_embeddings.shape[1] == 37
    ViTEncoder("nano", channels=3, image_size=32).save_pretrained(tmp_path / "three")
    with pytest.raises(AoiError, match="made for 3 channels; the images have 2"):
        pretrain(images, **SMALL, budget="1 steps", start_from=tmp_path / "three")
    plain = ViTEncoder("nano", image_size=32, patch_size=8, mean=[0.1, 0.2], std=[0.3, 0.4])
    plain.save_pretrained(tmp_path / "plain")
    other = pretrain(images, **still, decoder_width=32, start_from=tmp_path / "plain")
    assert other.mae.config.decoder_hidden_size == 32, "an encoder without a decoder leaves its width open"
    assert other.encoder.patch_size == 8 and torch.allclose(other.encoder.mean, torch.tensor([0.1, 0.2]))


# --- reconstruction ---


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (20, 130)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction(size, norm_pix):
    mae = new_vit(mae_config("nano", image_size=64, norm_pix=norm_pix), model=ViTMAEForPreTraining).eval()
    result = Pretrained(ViTEncoder(mae.vit, mean=[0.4, 0.5], std=[0.2, 0.1]), mae, pd.DataFrame())
    x = torch.rand(2, 2, *size)
    image, hidden, rebuilt = result.reconstruct(x, seed=1)
    assert torch.equal(image, x) and hidden.shape == (2, *size) and hidden.dtype == torch.bool
    assert rebuilt.shape == x.shape and 0 <= rebuilt.min() and rebuilt.max() <= 1
    shown = ~hidden[:, None].expand_as(x)
    assert torch.equal(rebuilt[shown], x[shown]) and not torch.equal(rebuilt, x)
    assert torch.equal(rebuilt, result.reconstruct(x, seed=1).rebuilt)
    assert not torch.equal(hidden, result.reconstruct(x, seed=2).hidden)
    if size == (64, 64):
        assert 0.65 < hidden.float().mean() < 0.76
        assert hidden.unfold(1, 16, 16).unfold(2, 16, 16).flatten(3).float().mean(-1).unique().tolist() == [0, 1]
        few = result.reconstruct(x, mask_ratio=0.25)
        assert few.hidden.float().mean() == 0.25 and mae.config.mask_ratio == 0.7
    with pytest.raises(AoiError, match="3 channels"):
        result.reconstruct(torch.rand(1, 3, 64, 64))


def test_reconstruction_in_parts_is_the_same(monkeypatch):
    "An image with more windows than go through the network at once."
    mae = new_vit(mae_config("nano", image_size=32), model=ViTMAEForPreTraining).eval()
    result = Pretrained(ViTEncoder(mae.vit), mae, pd.DataFrame())
    x, seen = torch.rand(2, 2, 100, 70), []
    assert 2 * 4 * 3 < pretrain_module._WINDOWS
    whole = result.reconstruct(x)
    monkeypatch.setattr(pretrain_module, "_WINDOWS", 7)
    hook = mae.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    parts = result.reconstruct(x)
    hook.remove()
    assert seen == [7, 7, 7, 3] and torch.equal(parts.hidden, whole.hidden)
    assert torch.allclose(parts.rebuilt, whole.rebuilt, atol=1e-5)


def test_reconstruction_knows_nothing_of_hidden_patches():
    """Two images that differ only where patches are hidden are rebuilt alike: not even their brightness leaks."""
    mae = new_vit(mae_config("nano", image_size=64), model=ViTMAEForPreTraining).eval()
    result = Pretrained(ViTEncoder(mae.vit), mae, pd.DataFrame())
    x = torch.rand(1, 2, 64, 64)
    _, hidden, rebuilt = result.reconstruct(x)
    other = torch.where(hidden[:, None], 0.9, x)
    assert torch.allclose(result.reconstruct(other).rebuilt, rebuilt, atol=1e-5)


def test_visible_statistics_by_hand():
    patches = torch.tensor([[0.0, 2.0], [5.0, 5.0], [9.0, 9.0], [1.0, 3.0]])[None]
    mean, std = visible_statistics(patches, torch.tensor([[False, True, True, False]]))
    assert torch.allclose(mean[0, 1:3, 0], torch.tensor([1.5, 1.5]))  # 0 and 3 are equally far from 1 and 2
    assert torch.allclose(std[0, 1, 0], torch.tensor(2.0).sqrt())


# --- refusals ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": 100}, "100 is no multiple of the patch size 16. Use 96"),
        ({"crop": 320}, "smaller than a crop of 320"),
        ({"budget": "soon"}, "no budget"),
        ({"encoder": "huge"}, "no encoder preset 'huge'"),
        ({"mask_ratio": 0}, "mask_ratio is 0"),
        ({"resume": True}, "Pass out"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"base_lr": float("nan")}, "base_lr is nan; a finite number above 0"),
        ({"base_lr": -1e-3}, "base_lr is -0.001"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; a finite number from 0"),
        ({"warmup": 2.0}, "warmup is 2.0; a finite number from 0 to 1"),
        ({"report_to": "paper"}, "report_to is 'paper'"),
        ({"validation": "other lights"}, "validation images have 1 channels .* the others 2"),
        ({"validation": "small"}, "smaller than a crop of 64"),
        ({"validation": "none"}, "no images"),
        ({"out": __file__}, "is a file"),
    ],
)
def test_wrong_plans_are_refused_before_an_image_is_read(images, wrong, message, tmp_path, monkeypatch):
    if (name := wrong.get("validation")) == "none":
        wrong = {"validation": images.select([])}
    elif name:
        wrong = {"validation": grey(tmp_path, (96, 96) if name == "other lights" else (48, 96), name == "small")}
    monkeypatch.setattr("aoi_ssl.data.read_native", lambda *a, **k: pytest.fail("an image was read"))
    with pytest.raises(AoiError, match=message):
        pretrain(images, **({**SMALL, "budget": "1 steps"} | wrong))


def test_an_output_folder_that_is_not_empty_is_refused(images, trained, tmp_path):
    _, out = trained
    with pytest.raises(AoiError, match="not empty"):
        pretrain(images, out, **SMALL, budget="1 steps")
    assert load_pretrained(out)


def test_an_empty_dataset_is_refused(images):
    with pytest.raises(AoiError, match="no images"):
        pretrain(images.select([]), **SMALL, budget="1 steps")


def test_one_small_image_that_shrinks_every_crop_is_named(tmp_path):
    mixed = grey(tmp_path, (256, 300), True, (100, 400))
    with pytest.warns(UserWarning, match="acme/d1/im1, has a side of 100 pixels: the crop is 96 and not 224"):
        result = pretrain(mixed, encoder="nano", batch_size=2, budget="1 steps", progress=False)
    assert result.mae.config.image_size == 96
    with warnings.catch_warnings(action="error"):
        assert default_crop(mixed.select([0]), most=224, patch_size=16) == 224
        assert default_crop(mixed.select([1]), most=224, patch_size=16) == 96  # all are small: nothing is lost
        assert default_crop(mixed, most=96, patch_size=16) == 96
        pretrain(mixed, **SMALL, budget="1 steps")  # said by the user: no warning


def test_crops_fit_the_smallest_image_by_default(images):
    result = pretrain(images, encoder="nano", batch_size=2, budget="1 steps", progress=False)
    assert result.mae.config.image_size == 224


def test_labels_are_never_opened(folder, monkeypatch):
    import aoi_ssl.data as data

    labelled = load_folder(folder)["train"]
    assert all(labelled["labelled"])
    monkeypatch.setattr(data, "read_mask", lambda *a, **k: pytest.fail("a mask was read"))
    pretrain(labelled, **SMALL, budget="2 steps", validation=labelled)


# processes, trackers, and what goes wrong

SEVERAL = ROOT / "nbs" / "howto" / "several_gpus.ipynb"


@pytest.mark.skipif(not SEVERAL.exists(), reason="needs the source tree")
def test_two_processes_give_the_losses_of_one(rendered, tmp_path):
    "As the page tells it: `accelerate launch` starts two, which are one run; where it starts one, the script refuses."
    first, *code = ["".join(c["source"]) for c in json.loads(SEVERAL.read_text())["cells"] if c["cell_type"] == "code"]
    names = {"runs": tmp_path, "folder": rendered}
    exec("\n".join(line for line in first.splitlines() if line.startswith(("import ", "from "))), names)
    for cell in code:
        exec(cell, names)
        if cell.startswith("script = "):  # each process leaves a sign
            with open(names["script"], "a") as script:
                script.write('    open(f"{out}.{Accelerator().process_index}-of-{processes}", "w")\n')
    assert sorted(p.name for p in tmp_path.glob("*-of-*")) == ["two.0-of-2", "two.1-of-2"]
    one, two = names["one"].to_numpy(), names["two"].to_numpy()
    assert len(one) == len(two) == 4 and np.abs(one - two).max() < 1e-5
    assert np.ptp(one) > 1e-3  # the losses change, so that agreeing means something


def test_a_tracker_hears_of_every_tenth_step(images):
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory, tracker = "notes", False, None

        def __init__(self):
            self.config, self.said = None, {}

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **kwargs):
            self.said[step] = values

    notes = Notes()
    history = pretrain(images, **SMALL, budget="20 steps", report_to=[notes]).history
    assert sorted(notes.said) == [9, 19] and notes.said[19]["loss"] == history.loss.iloc[19] and "batch" in notes.config
    with pytest.raises(AoiError, match="report_to is 'paper'"):
        pretrain(images, **SMALL, budget="1 steps", report_to="paper")


def test_what_to_expect_is_said_before_the_first_step_and_changes_nothing(images, capsys):
    said, loud = [], {**SMALL, "progress": True}
    told = pretrain(images, **loud, budget="18 steps", on_step=lambda *_: said.append(capsys.readouterr().out))
    assert re.search(r"About \d+ images a second: 18 steps of 4, 0\.5 epochs, in \d+ s\.", said[0])  # 36 steps an epoch
    assert not any(said[1:]) and told.history.loss.equals(pretrain(images, **SMALL, budget="18 steps").history.loss)


def test_a_loss_that_is_no_number_stops_the_run_and_its_batch_is_kept(images, tmp_path):
    class Broken(Augment):
        def __call__(self, image, *, seed, **options):
            bad = seed == step_seed(0, 3, 1)
            return (image * float("nan") if bad else image), None, None

    with pytest.raises(AoiError, match="became nan at step 3.*The batch is in"):
        pretrain(images, tmp_path / "out", augment=Broken(), **SMALL, budget="8 steps")
    kept = load_file(tmp_path / "out.batch.safetensors")
    assert kept["pixels"].isnan().all() and kept["noise"].shape == (4, 16)
    assert not (tmp_path / "out").exists()


def test_patience_ends_a_run_early(images, tmp_path):
    with pytest.raises(AoiError, match="patience=12 can never run out"):
        pretrain(images, **SMALL, budget="20 steps", validation=images.select([0]), patience=12)
    history = pretrain(images, **SMALL, budget="60 steps", validation=images.select([0]), patience=1, base_lr=1.0).history
    assert len(history) < 60


def test_images_decoded_already_are_not_decoded_again(images, tmp_path, monkeypatch):
    crops = store_images(images, tmp_path / "store", cell=64)
    expected = pretrain(images, **SMALL, budget="3 steps").history
    monkeypatch.setattr("aoi_ssl.crops.native_item", None)
    assert pretrain(images, **SMALL, budget="3 steps", crops=crops).history.loss.equals(expected.loss)


def test_images_of_a_run_that_was_given_up_are_not_taken_for_others(rendered, images, tmp_path):
    "Other images under the same names, after a run that was stopped: overwriting begins anew, pixels too."
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, tmp_path / "out", augment=stop_at(1), **SMALL, budget="4 steps")
    other = tmp_path / "others"
    shutil.copytree(rendered, other)
    for file in other.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    inverted = load_folder(other)["pretrain"]
    assert list(inverted["stem"]) == list(images["stem"])
    expected = pretrain(inverted, **SMALL, budget="4 steps")
    found = pretrain(inverted, tmp_path / "out", overwrite=True, **SMALL, budget="4 steps")
    assert found.history.loss.equals(expected.history.loss)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["others", "out"]


def test_on_step_is_told_the_encoder_as_it_is(images):
    told = []
    result = pretrain(images, **SMALL, budget="3 steps", on_step=lambda encoder, spent: told.append((encoder.fingerprint(), spent)))
    assert [spent for _, spent in told] == [pytest.approx(n / 3) for n in (1, 2, 3)]
    assert len({name for name, _ in told}) == 3 and told[-1][0] == result.encoder.fingerprint()


def test_the_encoder_on_the_way_is_kept_also_by_a_run_that_was_killed(images, tmp_path):
    "The start and three more, in the folder; those of a resumed run are those of an unbroken one; nothing is left beside."
    from aoi_ssl.runs import open_snapshots

    def press(encoder, spent):
        if spent == 0.5:
            os.kill(os.getpid(), signal.SIGINT)

    whole = pretrain(images, tmp_path / "whole", budget="16 steps", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, tmp_path / "stopped", budget="16 steps", on_step=press, **SMALL)
    later = tmp_path / "stopped.snapshots" / "step_12.safetensors"  # taken after the checkpoint, before a power failure
    later.write_bytes(b"half of it")
    stopped = pretrain(images, tmp_path / "stopped", budget="16 steps", resume=True, **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stopped", "whole"]
    one, other = (open_snapshots(run.snapshots) for run in (whole, stopped))
    assert list(one) == list(other) == ["start", "step 1", "step 4", "step 8"]
    assert all(one[n].fingerprint() == other[n].fingerprint() for n in one)
    assert len({e.fingerprint() for e in one.values()} | {whole.encoder.fingerprint()}) == 5
    again = load_pretrained(tmp_path / "whole").snapshots
    assert [e.fingerprint() for e in open_snapshots(again).values()] == [e.fingerprint() for e in one.values()]
    assert pretrain(images, tmp_path / "none", budget="2 steps", snapshots=False, **SMALL).snapshots is None
    assert not (tmp_path / "none" / "snapshots").exists()


def test_the_first_snapshot_of_a_continued_encoder_is_that_encoder(images, tmp_path):
    from aoi_ssl.runs import open_snapshots

    first = pretrain(images, tmp_path / "first", budget="3 steps", **SMALL)
    second = pretrain(images, budget="2 steps", start_from=tmp_path / "first", **SMALL)
    picture = images[0]["image"][None]
    assert torch.allclose(open_snapshots(second.snapshots)["start"].encode(picture), first.encoder.encode(picture), atol=1e-5)
