"Patches that find themselves again: pairs by hand, the loss by hand, runs that resume, twins that must fit."

import os
import signal

import pytest
import torch
from torch.nn import functional as F

from aoi_ssl.augment import Augment
from aoi_ssl.contrastive import cut_views, default_reach, paired_batches, patch_info_nce, pretrain_contrastive
from aoi_ssl.core import AoiError
from aoi_ssl.crops import store_images
from aoi_ssl.data import channel_stats, load_folder
from aoi_ssl.encoder import Encoder, ViTEncoder
from aoi_ssl.features import with_layers
from aoi_ssl.pretrain import pretrain
from aoi_ssl.remember import learn_space
from aoi_ssl.synthetic import Drift, render_folder

SMALL = {"encoder": "nano", "patch_size": 8, "crop": 64, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Nine pictures, and the same under other light and material."
    path, found = tmp_path_factory.mktemp("contrastive"), []
    for name, drift in {"plain": 0, "drifted": Drift(light=1, focus=1, material=1)}.items():
        render_folder(path / name, devices=0, new_devices=0, pretrain_devices=3, images=3, size=128, drift=drift, progress=False)
        found.append(load_folder(path / name)["pretrain"])
    return found


@pytest.fixture(scope="module")
def stores(pair):
    return [store_images(images, cell=80) for images in pair]


def batches(stores, **options):
    return paired_batches(stores[0], ViTEncoder("nano", patch_size=8), size=64, batch_size=4, reach=2, **options)


# --- pairs ---


def patches_of(views):
    "(B, C, S, S) to (B, N, pixels of a patch)."
    return F.unfold(views, 8, stride=8).mT


@pytest.mark.parametrize("augment", [None, Augment(blur=0, contrast=0, noise=0)], ids=["as it is", "turned and flipped"])
def test_equal_numbers_mean_the_same_pixels(stores, augment):
    batch = batches(stores, augment=augment)(0)
    first, second = (patches_of(view).flatten(0, 1) for view in batch["pixels"])
    one, two = batch["patches"].flatten(1)
    rows, columns = (one[:, None] == two).nonzero().T
    assert len(rows) > 100 and torch.equal(first[rows], second[columns])
    assert (batch["patches"][0] != batch["patches"][1]).any(), "the same patch at another place"


def test_no_two_images_of_a_batch_share_a_number(stores):
    for view in batches(stores)(0)["patches"]:
        assert len(view.unique()) == view.numel()


def test_twins_are_cut_at_the_places_of_the_images(stores):
    plain, twins = batches(stores)(3), batches(stores, twins=stores[1])(3)
    assert torch.equal(plain["patches"], twins["patches"]) and torch.equal(plain["pixels"][0], twins["pixels"][0])
    assert not torch.allclose(plain["pixels"][1], twins["pixels"][1], atol=0.1)
    again = paired_batches(stores[1], ViTEncoder("nano", patch_size=8), size=64, batch_size=4, reach=2)(3)
    assert torch.equal(again["pixels"][1], twins["pixels"][1])


def test_the_views_change_each_for_itself(stores):
    changed, plain = (batches(stores, augment=a)(0) for a in (Augment(flips=False, turns=False, noise=0, blur=0), None))
    ratio = [(c - p).abs().mean() for c, p in zip(changed["pixels"], plain["pixels"], strict=True)]
    assert min(ratio) > 0.01 and abs(ratio[0] - ratio[1]) > 1e-3


def test_one_index_one_batch_and_two_processes_see_what_one_would(stores):
    change = Augment(contrast=0.5)
    whole = paired_batches(stores[0], ViTEncoder("nano", patch_size=8), size=64, batch_size=4, reach=2, augment=change)
    halves = paired_batches(stores[0], ViTEncoder("nano", patch_size=8), size=64, batch_size=2, reach=2, augment=change, processes=2)
    assert all(torch.equal(whole(5)[name], whole(5)[name]) for name in ("pixels", "patches"))
    assert torch.equal(torch.cat([halves(10)["pixels"], halves(11)["pixels"]], dim=1), whole(5)["pixels"])


@pytest.mark.parametrize(("crop", "patch_size", "patches"), [(224, 16, 4), (224, 8, 8), (96, 16, 1), (16, 16, 1)])
def test_the_reach_is_two_sevenths_of_a_view(crop, patch_size, patches):
    assert default_reach(crop, patch_size) == patches


# --- the loss ---


def test_the_loss_by_hand():
    "Each patch that both views show, asked both ways, among all patches of the other view."
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2, 9, 6, generator=generator)
    patches = torch.stack([
        cut_views(torch.zeros(2, 1, 5, 5), torch.tensor(corners), size=3, patch_size=1)[1]
        for corners in ([[0, 0], [2, 1]], [[1, 1], [0, 2]])
    ])  # fmt: skip
    one, two = (F.normalize((x - x.mean(1, keepdim=True)).reshape(18, 6), dim=1) for x in (first, second))
    ways = []
    for a, b, p, q in (one, two, *patches.flatten(1)), (two, one, *patches.flatten(1).flip(0)):
        losses = []
        for i in range(18):
            if p[i] in q:
                scores = torch.stack([a[i] @ other / 0.2 for other in b])
                losses.append(-scores.log_softmax(0)[(q == p[i]).nonzero().item()])
        ways.append(torch.stack(losses).mean())
    assert torch.allclose(patch_info_nce(first, second, patches, temperature=0.2), sum(ways) / 2, atol=1e-5)


# --- runs ---


def test_it_learns_to_find_patches_in_their_twins(pair, stores):
    "On images that it learned from; drawn weights, and the place in the view, do not get there."

    def loss(encoder):
        with torch.no_grad():
            batch = paired_batches(stores[0], encoder, size=64, batch_size=8, reach=2, twins=stores[1])(0)
            return patch_info_nce(*encoder.embed(batch["pixels"].flatten(0, 1)).flatten(1, 2).chunk(2), batch["patches"]).item()

    learned = pretrain_contrastive(pair[0], **SMALL, twins=pair[1], budget="80 steps", base_lr=0.1).encoder
    drawn = pretrain_contrastive(pair[0], **SMALL, budget="1 steps", base_lr=1e-12).encoder
    assert loss(learned) < 0.8 * loss(drawn)


def test_a_run_that_was_stopped_goes_on_to_the_same_end(pair, tmp_path):
    options = SMALL | {"twins": pair[1], "budget": "8 steps", "validation": pair[0].select([0])}
    whole, out, steps = pretrain_contrastive(pair[0], **options), tmp_path / "encoder", []

    def stop(encoder, spent):
        steps.append(spent)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        pretrain_contrastive(pair[0], out, on_step=stop, **options)
    assert not out.exists()
    with pytest.raises(AoiError, match="Resume with the same settings"):
        pretrain_contrastive(pair[0], out, resume=True, **(options | {"temperature": 0.2}))
    resumed = pretrain_contrastive(pair[0], out, resume=True, **options)
    assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    assert resumed.history.validation_loss.notna().sum() > 3
    assert resumed.encoder.fingerprint() == whole.encoder.fingerprint() == Encoder.from_pretrained(out).fingerprint()


def test_it_goes_on_from_an_autoencoder_and_an_autoencoder_from_it(pair, tmp_path):
    shared = {"crop": 64, "batch_size": 4, "progress": False, "budget": "2 steps"}
    pretrain(pair[0], tmp_path / "mae", encoder="nano", patch_size=8, **shared)
    still = pretrain_contrastive(pair[1], tmp_path / "out", start_from=tmp_path / "mae", base_lr=1e-12, **shared)
    begun = Encoder.from_pretrained(tmp_path / "mae")
    assert torch.equal(still.encoder.mean, begun.mean) and torch.allclose(still.encoder.mean, channel_stats(pair[0])[0])
    x = torch.rand(1, 2, 80, 70)
    assert torch.allclose(still.encoder.encode(x), begun.encode(x), atol=1e-3)
    more = pretrain(pair[0], start_from=tmp_path / "out", base_lr=1e-12, **shared)
    assert torch.allclose(more.encoder.encode(x), begun.encode(x), atol=1e-3)
    with pytest.raises(AoiError, match="encoder is 'tiny', but the weights of .* have encoder 'nano'"):
        pretrain_contrastive(pair[0], start_from=tmp_path / "mae", encoder="tiny", **shared)


def test_packed_it_opens_and_embeds_nearly_the_same(pair, tmp_path):
    result = pretrain_contrastive(pair[0], **SMALL, budget="1 steps")
    result.save(tmp_path / "packed", packed=True)
    opened, x = Encoder.from_pretrained(tmp_path / "packed"), torch.rand(1, 2, 64, 64)
    assert F.cosine_similarity(opened.encode(x), result.encoder.encode(x), dim=-1).min() > 0.999
    more = pretrain(pair[0], start_from=tmp_path / "packed", crop=64, batch_size=4, budget="1 steps", progress=False)
    assert more.encoder.patch_size == 8


def test_a_bank_compares_by_the_block_that_was_trained_to(pair, tmp_path):
    "By default, and however the encoder was read; other blocks on demand; a masked autoencoder that goes on from it forgets."
    folder = tmp_path / "encoder"
    result = pretrain_contrastive(pair[0], **SMALL, budget="1 steps")
    assert with_layers(result.encoder, 1 / 3).layers == [2] == result.encoder.layers
    result.save(folder, packed=True)
    assert with_layers(Encoder.from_pretrained(folder), 1 / 3).layers == [2]
    assert with_layers(result.encoder, [1]).layers == [1]
    more = pretrain(pair[0], start_from=folder, crop=64, batch_size=4, budget="1 steps", progress=False)
    assert with_layers(more.encoder, 1 / 3).layers == [1]


def test_a_bank_of_an_encoder_that_compares_is_whitened_by_variance(pair):
    "It is steady already; read by another block it is like any other encoder."
    encoder = pretrain_contrastive(pair[0], **SMALL, budget="1 steps").encoder
    plain, early = (learn_space(pair[0], encoder, method="fast", size=64, **changes) for changes in ({}, {"layers": [1]}))
    assert [step.kind for step in plain.steps] == ["whiten"] and [step.kind for step in early.steps] == ["steady"]


def test_the_default_crop_leaves_room_for_the_reach(pair):
    result = pretrain_contrastive(pair[0], encoder="nano", batch_size=2, budget="1 steps", progress=False)
    assert result.encoder.vit.config.image_size == 96  # of 128 pixels: 6 patches and a reach of 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": 60}, "60.*multiple of the patch size 8"),
        ({"crop": 128}, "Views of 128 pixels at two corners need 160 pixels, .* a side of 128. Choose crop=96"),
        ({"crop": 64, "reach": 9}, "need 136 pixels, .* Choose crop=96 and no reach"),
        ({"crop": 136}, "smaller than a crop"),
        ({"reach": 0}, "reach is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"patience": 2}, "nothing to validate on"),
    ],
)
def test_wrong_plans_are_refused(pair, wrong, message):
    with pytest.raises(AoiError, match=message):
        pretrain_contrastive(pair[0], **(SMALL | {"budget": "1 steps"} | wrong))


@pytest.mark.parametrize("decoded", [False, True], ids=["a dataset", "a store"])
def test_twins_of_other_pictures_are_refused_before_an_image_is_decoded(pair, decoded, monkeypatch):
    few, swapped = (pair[1].select(rows) for rows in (range(5), [1, 0, *range(2, 9)]))
    few, swapped = (store_images(part, cell=80) if decoded else part for part in (few, swapped))
    monkeypatch.setattr("aoi_ssl.contrastive.open_crops", None)
    other = r"The twin of .*/im000 \(128 x 128 .* is .*/im001 .* the same name"
    for twins, message in (few, "There are 5 twins of 9 images"), (swapped, other):
        with pytest.raises(AoiError, match=message):
            pretrain_contrastive(pair[0], **SMALL, budget="1 steps", twins=twins)
