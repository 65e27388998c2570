"Fine-tuning: each test is a fault of the published code, a bad input, or a promise of the module."

import importlib
import os
import re
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, HieraConfig, HieraModel

from aoi_ssl.augment import Augment
from aoi_ssl.core import AoiError, read_json, write_json
from aoi_ssl.data import load_folder
from aoi_ssl.encoder import BackboneEncoder, PixelEncoder, ViTEncoder, quiet
from aoi_ssl.hiera import HieraEncoder, pretrain_hiera, unrolled_order
from aoi_ssl.predict import load_segmenter
from aoi_ssl.retrieval import MemoryBank
from aoi_ssl.segment import UperHead, UperNet, expect_shares, finetune, masked_bce, parameter_groups, validator

segment_module = importlib.import_module("aoi_ssl.segment")  # `aoi_ssl.segment` itself is the verb
CLASSES = ["wire", "ball", "wedge", "epoxy"]
SHORT = dict(budget="3 steps", crop=64, batch_size=2, hidden=8, progress=False)


def nano(channels=2, seed=0, **options):
    return ViTEncoder("nano", channels=channels, image_size=64, seed=seed, **options)


def hiera(seed=0, **options):
    return HieraEncoder("hiera-nano", image_size=64, seed=seed, **options)


def new_model(encoder=nano, **options):
    return UperNet.build(encoder(), CLASSES, hidden=8, **options)


either = pytest.mark.parametrize("encoder", [nano, hiera], ids=["vit", "hiera"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Networks this small are slower on two threads, and far slower on a busy machine."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(folder):
    return load_folder(folder)


def batch_of(model, size=64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(2, 2, size, size, generator=draw), torch.rand(2, 4, size, size, generator=draw) > 0.8


# The network


def test_the_parts_of_transformers_are_where_they_are_expected():
    neck, head = segment_module._upernet_parts()
    assert (neck.__name__, head.__name__) == ("BeitFPNNeck", "UperNetHead")


def test_parts_that_moved_are_a_clear_error(monkeypatch):
    from transformers.models.beit import modeling_beit

    monkeypatch.delattr(modeling_beit, "BeitFPNNeck")
    with pytest.raises(AoiError, match=r"transformers 5.*BeitFPNNeck.*pip install"):
        UperHead(48, classes=4)


def test_four_maps_of_four_scales_from_the_last_four_blocks():
    model = UperNet.build(ViTEncoder("tiny", image_size=64), CLASSES, hidden=8)
    assert model.blocks == [3, 4, 5, 6]
    features = model.features(torch.rand(1, 2, 64, 96))
    assert [tuple(m.shape[1:]) for m in model.decoder.maps(features)] == [(8, 16, 24), (8, 8, 12), (8, 4, 6), (8, 2, 3)]
    assert all(not torch.equal(a, b) for a, b in zip(features, features[1:], strict=False))
    assert new_model().blocks == [1, 1, 1, 2]


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("shape", [(64, 64), (5, 70), (33, 17), (16, 48)])
def test_any_size_keeps_its_size(shape, patch_size):
    model = UperNet.build(nano(patch_size=patch_size), CLASSES, hidden=8)
    p = model.predict(torch.rand(2, 2, *shape))
    assert p.shape == (2, 4, *shape) and p.dtype == torch.float32 and 0 <= p.min() and p.max() <= 1


@pytest.mark.parametrize("stages", [3, 4])
@pytest.mark.parametrize("shape", [(64, 64), (5, 70), (33, 17), (16, 48)])
def test_stages_go_into_the_head_as_they_are_at_any_size(shape, stages):
    "Also the four of the original, with mask units of 32 pixels."
    few = dict(depths=[1] * 4, embed_dim=8, num_heads=[1] * 4, image_size=[64, 64], num_channels=2)
    encoder = hiera() if stages == 3 else HieraEncoder(HieraModel(HieraConfig(**few), add_pooling_layer=False))
    model = UperNet.build(encoder, CLASSES, hidden=8)
    image = torch.rand(2, 2, *shape)
    unit, features = 4 * 2 ** (stages - 1), model.features(image)
    height, width = (-(-side // unit) * unit for side in shape)
    sides = [tuple(m.shape[2:]) for m in features]
    assert sides == [(height // s, width // s) for s in (4, 8, 16, 32)[:stages]]
    assert all(a is b for a, b in zip(model.decoder.maps(features), features, strict=True))
    assert model.predict(image).shape == (2, 4, *shape)


def test_a_hiera_starts_from_what_it_has_learned(images, tmp_path):
    "transformers itself, from the folder of the pre-training, gives the maps that the head sees."
    options = dict(encoder="hiera-nano", crop=64, batch_size=4, budget="3 steps", progress=False)
    learned = pretrain_hiera(images["pretrain"], tmp_path / "encoder", stages=(3,), **options).encoder
    image = torch.rand(2, 2, 64, 64)
    with quiet(), torch.no_grad():
        theirs = HieraModel.from_pretrained(tmp_path / "encoder").eval()
        expected = theirs(learned.normalise(image), output_hidden_states=True).reshaped_hidden_states[1:]
        found = UperNet.build(learned, CLASSES, hidden=8).features(image)
    assert not torch.equal(theirs.encoder.stages[0].layers[0].attn.qkv.weight, hiera().hiera.encoder.stages[0].layers[0].attn.qkv.weight)
    for ours, stage in zip(found, expected, strict=True):
        assert torch.allclose(ours.permute(0, 2, 3, 1), F.layer_norm(stage, stage.shape[-1:]), atol=1e-5)


def test_positions_of_a_hiera_are_those_of_the_place_at_any_size():
    "In 96 x 160 pixels, with an encoder for 64 x 64: the table is stretched over the image, in spatial order."
    model, seen = new_model(hiera), []
    embeddings = model.encoder.hiera.embeddings
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.zero_()
        embeddings.patch_embeddings.projection.bias.zero_()
        model.encoder.hiera.encoder.stages[0].register_forward_pre_hook(lambda stage, given: seen.append(given[0]))
        model.features(torch.rand(1, 2, 96, 160))
    grid = seen[0][0, unrolled_order(24, 40, 2).argsort()].view(24, 40, 16)
    row, column = ((torch.arange(n) + 0.5) * 16 / n - 0.5 for n in (24, 40))
    inside = slice(5, -5)  # beyond, the table is continued by its outermost values
    assert torch.allclose(grid[inside, inside, 9], (0.1 * row).sin()[inside, None].expand(14, 30), atol=0.01)
    assert torch.allclose(grid[inside, inside, 1], (0.1 * column).sin()[None, inside].expand(14, 30), atol=0.01)


def test_outputs_lie_where_the_image_is():
    "A change of one patch changes each map most at its place, and the logits near it: nothing is shuffled or transposed."
    model = new_model()
    image = torch.full((1, 2, 64, 96), 0.5)
    moved = image.clone()
    moved[..., 16:32, 64:80] = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = zip(model.features(moved), model.features(image), strict=True)
        for change in ((a - b).abs().sum((0, 1)) for a, b in features):
            assert divmod(change.argmax().item(), 6) == (1, 4)
        finest = [model.decoder.maps(model.features(i))[0] for i in (moved, image)]
        finest = (finest[0] - finest[1]).abs().sum((0, 1))
        y, x = divmod(finest.argmax().item(), 24)
        assert 4 <= y < 8 and 16 <= x < 20
        change = (model(moved) - model(image)).abs().sum((0, 1))
    assert change[8:40, 56:88].mean() > 2 * change[:, :40].mean()


def test_predict_is_the_sigmoid_in_eval_mode_and_one_image_does_not_depend_on_its_neighbours():
    model = new_model().train()
    image, _ = batch_of(model)
    together = model.predict(image)
    assert model.training
    assert torch.allclose(together[:1], model.predict(image[:1]), atol=1e-6)
    assert torch.equal(together, model.eval()(image).sigmoid())


def test_classes_overlap():
    "A sigmoid per class: two classes may both be certain; a softmax could not say so."
    model = new_model()
    with torch.no_grad():
        model.decoder.head.classifier.bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
    assert (model.predict(torch.rand(1, 2, 64, 64))[0, :2] > 0.9).all()


def test_wrong_images_are_refused():
    model = new_model()
    for wrong in (torch.rand(1, 3, 64, 64), 255 * torch.rand(1, 2, 64, 64), torch.rand(2, 64, 64)):
        with pytest.raises(AoiError):
            model.predict(wrong)


# The loss


def test_loss_by_hand_and_ignored_pixels_count_for_nothing():
    logits = torch.tensor([[[[2.0, -1.0]], [[0.0, 5.0]]]], requires_grad=True)
    mask = torch.tensor([[[[True, True]], [[False, False]]]])
    ignore = torch.tensor([[[[False, False]], [[False, True]]]])
    expected = (np.log1p(np.exp(-2)) + np.log1p(np.exp(1)) + np.log(2)) / 3
    loss = masked_bce(logits, mask, ignore)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad[0, 1, 0, 1] == 0 and (logits.grad != 0).sum() == 3
    assert masked_bce(logits, mask).item() == pytest.approx((3 * expected + np.log1p(np.exp(5))) / 4, rel=1e-5)


def test_nothing_judged_is_no_loss_and_no_nan():
    model = new_model().train()
    image, mask = batch_of(model)
    loss = masked_bce(model(image), mask, torch.ones_like(mask))
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_large_logits_stay_finite():
    mask = torch.tensor([[[[True, False]]]])
    assert masked_bce(torch.tensor([[[[-1e4, 1e4]]]]), mask).item() == pytest.approx(1e4)


# Layer-wise decay


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = new_model()
    model.encoder.vit.layers[0].mlp.fc1.bias.requires_grad_(False)
    grouped = [p for g in parameter_groups(model) for p in g["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) == len(trainable) == len(list(model.parameters())) - 1
    assert {id(p) for p in grouped} == {id(p) for p in trainable}
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)] for p in grouped}
    assert {f"encoder.vit.{n}" for n in ("embeddings.cls_token", "embeddings.position_embeddings", "layernorm.weight")} <= found


def test_rates_fall_from_the_head_to_the_pixels():
    model = UperNet.build(ViTEncoder("tiny", image_size=32), CLASSES, hidden=8)
    groups = parameter_groups(model, lr=0.1, layer_decay=0.5, weight_decay=0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    rate = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    decay = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    for i in range(6):
        assert {v for n, v in rate.items() if f"vit.layers.{i}." in n} == {0.1 * 0.5 ** (6 - i)}
    assert {v for n, v in rate.items() if ".embeddings." in n} == {0.1 * 0.5**7}
    assert {v for n, v in rate.items() if n.startswith(("decoder.", "encoder.vit.layernorm."))} == {0.1}
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or "token" in name or "position" in name
        assert decay[name] == (0.0 if free else 0.3), name


def test_the_blocks_of_a_hiera_are_counted_through_its_stages():
    model = new_model(hiera)
    groups = parameter_groups(model, lr=0.1, layer_decay=0.5, weight_decay=0.3)
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    given = {id(p): (g["name"], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    stages = "encoder.hiera.encoder.stages"
    for name, expected in {  # one block in each of the first two stages, two in the third
        "encoder.hiera.embeddings.position_embeddings": ("embeddings", 0.003125, 0.0),
        "encoder.hiera.embeddings.patch_embeddings.projection.weight": ("embeddings", 0.003125, 0.3),
        f"{stages}.0.layers.0.attn.qkv.weight": ("block 1", 0.00625, 0.3),
        f"{stages}.1.layers.0.proj.weight": ("block 2", 0.0125, 0.3),
        f"{stages}.2.layers.0.mlp.fc1.bias": ("block 3", 0.025, 0.0),
        f"{stages}.2.layers.1.layernorm_before.weight": ("block 4", 0.05, 0.0),
        "decoder.head.classifier.weight": ("head", 0.1, 0.3),
    }.items():
        assert given[id(model.get_parameter(name))] == pytest.approx(expected), name


@either
def test_one_step_moves_every_parameter_by_its_own_rate(encoder):
    "Adam's first step is the rate itself. Not so for key biases, which softmax cancels, and biases before a batch norm."
    model = new_model(encoder).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, layer_decay=0.5, weight_decay=0.0), eps=1e-12)
    image, mask = batch_of(model)
    masked_bce(model(image), mask).backward()
    optimizer.step()
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    cancelled = ("k_proj.bias", "fpn1.conv_transpose1.bias")
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max().item()
        assert moved > 0, name
        if not name.endswith(cancelled):
            assert moved == pytest.approx(rate[id(parameter)], rel=0.02), name


def test_a_parameter_that_has_no_place_is_an_error():
    model = new_model()
    model.encoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(AoiError, match="encoder.extra.weight"):
        parameter_groups(model)


# The first guess


def test_the_first_guess_is_the_share_of_each_class():
    mask, ignore = torch.zeros(2, 4, 8, 8, dtype=torch.bool), torch.zeros(2, 4, 8, 8, dtype=torch.bool)
    mask[0, 0], mask[:, 1, :, :2], mask[:, 3] = True, True, True
    ignore[1, 0], ignore[:, 3] = True, True
    model = new_model()
    shares = expect_shares(model, lambda index: {"mask": mask, "ignore": ignore}, batches=2)
    assert shares.tolist() == [1.0, 0.25, 0.0, 0.0]
    assert torch.allclose(model.decoder.head.classifier.bias.sigmoid(), torch.tensor([0.5, 0.25, 1e-4, 1e-4]), atol=1e-6)


# Fine-tuning


@either
def test_finetune_gives_a_whole_segmenter_and_leaves_the_encoder_alone(images, tmp_path, encoder):
    encoder = encoder(mean=[0.31, 0.47])
    before = encoder.fingerprint()
    with pytest.warns(UserWarning, match="threshold is 1.0"):
        model = finetune(images["train"], encoder, tmp_path / "seg", validation=images["calibration"], validations=2, **SHORT)
    assert encoder.fingerprint() == before != model.encoder.fingerprint()
    assert list(model.history.step) == [0, 1, 2] and model.history.loss.notna().all()
    assert {"validation_score", "validation_iou_wire", "validation_iou_epoxy"} <= {*model.history.columns}
    assert model.history.validation_score.notna().sum() == 2 and not model.training
    assert not torch.equal(model.thresholds, torch.full((4,), 0.5))
    again = load_segmenter(tmp_path / "seg")
    picture = torch.rand(1, 2, 70, 50)
    assert torch.equal(again.predict(picture), model.predict(picture))
    assert torch.equal(again.thresholds, model.thresholds) and again.classes == CLASSES
    assert again.history.equals(model.history) or np.allclose(again.history.loss, model.history.loss)
    assert torch.equal(again.encoder.mean, model.encoder.mean)
    assert {f.suffix for f in (tmp_path / "seg").rglob("[!.]*.*")} == {".json", ".csv", ".safetensors"}
    assert [p.name for p in tmp_path.iterdir()] == ["seg"]


def test_it_learns(images):
    one = images["train"].select([0])
    judge = validator(one)
    options = SHORT | {"budget": "40 steps", "batch_size": 4, "hidden": 16}
    model = finetune(one, nano(), augment=False, lr=3e-3, **options)
    new = UperNet.build(nano(), CLASSES, hidden=16)
    assert judge(model)["iou_epoxy"] > 0.5 > 2 * judge(new)["iou_epoxy"]
    assert model.history.loss[-5:].mean() < 0.8 * model.history.loss[:5].mean()


def test_one_seed_one_result_and_another_seed_another(images):
    first, same, other = (finetune(images["train"], nano(), seed=seed, **SHORT) for seed in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@either
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(images, tmp_path, encoder):
    class Stop(Augment):
        pressed = False

        def __call__(self, image, mask=None, ignore=None, *, seed):
            if not Stop.pressed:
                Stop.pressed = True
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(image, mask, ignore, seed=seed)

    options = SHORT | {"augment": Stop(), "out": tmp_path / "seg"}
    whole = finetune(images["train"], encoder(), **SHORT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 1"):
        finetune(images["train"], encoder(), **options)
    assert not (tmp_path / "seg").exists()
    with pytest.raises(AoiError, match="resume=True"):
        finetune(images["train"], encoder(), **options)
    with pytest.raises(AoiError, match="lr"):
        finetune(images["train"], encoder(), resume=True, lr=0.5, **options)
    others = images["train"].map(lambda row: {"stem": f"other_{row['stem']}"})
    with pytest.raises(AoiError, match="images"):
        finetune(others, encoder(), resume=True, **options)
    resumed = finetune(images["train"], encoder(), resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert resumed.history.loss.equals(whole.history.loss)


def test_training_is_augmented_and_validation_never_is(images):
    class Counted(Augment):
        calls = []

        def __call__(self, image, mask=None, ignore=None, *, seed):
            Counted.calls.append((len(image), seed))
            return super().__call__(image, mask, ignore, seed=seed)

    finetune(images["train"], nano(), validation=images["calibration"], validations=3, augment=Counted(), **SHORT)
    assert [n for n, _ in Counted.calls] == [2, 2, 2] and len({seed for _, seed in Counted.calls}) == 3


def test_on_step_is_told_the_segmenter_and_trackers_are_by_name(images):
    told = []
    model = finetune(images["train"], nano(), on_step=lambda model, spent: told.append((model, spent)), **SHORT | {"budget": "4 steps"})
    assert [spent for _, spent in told] == [0.25, 0.5, 0.75, 1.0] and all(one is model for one, _ in told)
    with pytest.raises(AoiError, match="report_to is 'paper'"):
        finetune(images["train"], nano(), report_to="paper", **SHORT)


def test_the_best_weights_are_kept(images, monkeypatch):
    kept, scores = [], iter([0.1, 0.9, 0.2])

    def judge(*args, **options):
        def validate(model):
            kept.append(model.decoder.head.classifier.weight.detach().clone())
            return {"score": next(scores)}

        return validate

    monkeypatch.setattr(segment_module, "validator", judge)
    model = finetune(images["train"], nano(), validation=images["calibration"], validations=3, **SHORT)
    assert torch.equal(model.decoder.head.classifier.weight, kept[1]) and not torch.equal(kept[1], kept[2])


def test_patience_longer_than_the_run_is_refused(images):
    with pytest.raises(AoiError, match="patience=10 can never run out"):
        finetune(images["train"], nano(), validation=images["calibration"], patience=10, **SHORT)


def test_validator_measures_by_summed_counts_and_leaves_absent_classes_out(images):
    class Told(UperNet):
        "Knows the masks of the images that it is asked about."

        kind = "told"

        def predict(self, x):
            best = min(range(len(items)), key=lambda i: (items[i]["image"] - x[0]).abs().sum().item())
            return items[best]["mask"][None].float() * torch.tensor([1.0, 1.0, 0.0, 0.5])[:, None, None]

    items = [images["new"][i] for i in range(2)]
    figures = validator(images["new"].select([0, 1]))(Told(nano(), CLASSES, hidden=8))
    assert figures["iou_wire"] == figures["iou_epoxy"] == 1 and figures["iou_wedge"] == 0
    assert figures["score"] == pytest.approx(0.75)


def test_only_the_main_process_writes_and_an_epoch_is_shared(images, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_module, "Accelerator", lambda: SimpleNamespace(num_processes=2, is_main_process=False))
    told = lambda thresholds: thresholds.__setitem__(0, [0.1, 0.2, 0.3, 0.4])  # noqa: E731  what the main process sends
    monkeypatch.setattr(segment_module, "broadcast_object_list", told)
    monkeypatch.setattr(UperNet, "calibrate", lambda *a: pytest.fail("calibrated in another process"))
    options = SHORT | {"budget": "2 epochs", "batch_size": 2}
    model = finetune(images["train"], nano(), tmp_path / "seg", calibration=images["calibration"], **options)
    assert not (tmp_path / "seg").exists() and torch.allclose(model.thresholds, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert len(model.history) == 2 * -(-len(images["train"]) // 4)


def test_a_new_model_is_where_its_encoder_is():
    model = UperNet.build(nano().to("meta"), CLASSES, hidden=8)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_one_small_image_that_shrinks_every_crop_is_named(images, monkeypatch):
    small = images["train"].select([0, 1])
    sizes = {"height": [256, 70], "width": [256, 256], "stem": small["stem"]}
    with pytest.warns(UserWarning, match=f"{small['stem'][1]}, has a side of 70 pixels: the crop is 64 and not 128"):
        assert segment_module.default_crop(sizes, most=128, patch_size=16) == 64
    asked = []
    monkeypatch.setattr(segment_module, "default_crop", lambda d, **o: (asked.append(o), 64)[1])
    finetune(small, nano(), **SHORT | {"crop": None})
    finetune(small, nano(), **SHORT)
    assert asked == [{"most": 128, "patch_size": 16}]


# One normalisation


def test_bank_and_network_normalise_as_their_encoder_does(images, tmp_path):
    encoder = nano(mean=[0.31, 0.47], std=[0.123, 0.211])
    with warnings.catch_warnings(action="ignore"):
        bank = MemoryBank.build(images["train"].select([0]), encoder, k=1)
    for name, made in {"bank": bank, "upernet": UperNet.build(encoder, CLASSES, hidden=8)}.items():
        made.save(tmp_path / name)
        for one in (made, load_segmenter(tmp_path / name)):
            assert torch.equal(one.encoder.mean, encoder.mean) and torch.equal(one.encoder.std, encoder.std)
            statistics = [n for n, _ in one.named_buffers() if n.rsplit(".", 1)[-1] in ("mean", "std")]
            assert statistics == ["encoder.mean", "encoder.std"], "one pair, the encoder's, and no other"


def test_no_module_has_statistics_of_its_own():
    photographs = re.compile(r"\b0?\.(485|456|406|229|224|225|5071|4867|4408)\d*\b|(?i:imagenet)")
    for file in Path(segment_module.__file__).parent.glob("*.py"):
        assert not (found := photographs.search(file.read_text())), f"{file.name}: {found[0]}"


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": float("nan")}, "lr is nan; a finite number above 0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5; a finite number above 0 up to 1"),
        ({"weight_decay": -1}, "weight_decay is -1; a finite number from 0"),
        ({"warmup": 2.0}, "warmup is 2.0"),
    ],
)
def test_rates_that_cannot_work_are_refused_before_an_image_is_read(images, wrong, message, monkeypatch):
    monkeypatch.setattr("aoi_ssl.data.read_native", lambda *a, **k: pytest.fail("an image was read"))
    with pytest.raises(AoiError, match=message):
        finetune(images["train"], nano(), **SHORT | wrong)


def test_what_to_expect_is_said_and_changes_nothing(images, capsys):
    loud, silent = (finetune(images["train"], nano(), **SHORT | {"budget": "2 steps", "progress": shown}) for shown in (True, False))
    assert re.search(r"About \d+ images a second: 2 steps of 2, .* epochs, in \d+ s\.", capsys.readouterr().out)
    assert all(torch.equal(a, b) for a, b in zip(loud.state_dict().values(), silent.state_dict().values(), strict=True))


def test_a_batch_of_one_is_refused_early(images):
    with pytest.raises(AoiError, match="batch_size is 1.*Use batch_size=2"):
        finetune(images["train"], nano(), **SHORT | {"batch_size": 1})


def test_one_labelled_image_is_enough(images):
    model = finetune(images["train"].select([0]), nano(), **SHORT)
    assert len(model.history) == 3


def test_unlabelled_images_are_named_or_refused(images):
    with pytest.raises(AoiError, match="None of the .* images has a label"):
        finetune(images["pretrain"], nano(), **SHORT)


def test_other_lights_other_encoders_other_classes_are_refused(images, folder, tmp_path):
    with pytest.raises(AoiError, match="2 channels"):
        finetune(images["train"], nano(channels=3), **SHORT)
    with quiet():
        tiny = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16)
        Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "dino")
    for other in (PixelEncoder(), BackboneEncoder(tmp_path / "dino")):
        with pytest.raises(AoiError, match=f"{type(other).__name__}; a ViTEncoder or a HieraEncoder was expected"):
            finetune(images["train"], other, **SHORT)
    other = load_folder(folder, classes=["die", "pad", "lead", "resin"])["calibration"]
    with pytest.raises(AoiError, match="classes"):
        finetune(images["train"], nano(), validation=other, **SHORT)


def test_a_crop_larger_than_an_image_is_refused(images):
    with pytest.raises(AoiError, match="smaller than a crop"):
        finetune(images["train"], nano(), **SHORT | {"crop": 512})


def test_a_folder_that_is_not_empty_is_refused_before_training(images, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AoiError, match="not empty"):
        finetune(images["train"], nano(), tmp_path, **SHORT)


def test_a_full_disk_leaves_the_old_segmenter(tmp_path, monkeypatch):
    model = new_model()
    model.save(tmp_path / "seg")
    old = (tmp_path / "seg" / "head.safetensors").read_bytes()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_module, "save_file", full)
    with pytest.raises(OSError):
        new_model(seed=5).save(tmp_path / "seg", overwrite=True)
    assert (tmp_path / "seg" / "head.safetensors").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["seg"]


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    new_model().save(tmp_path / "seg")
    manifest = read_json(tmp_path / "seg" / "segmenter.json")
    for change, message in (
        ({"classes": CLASSES[:3], "thresholds": [0.5] * 3}, "does not fit"),
        ({"channels": 3}, "channels"),
        ({"hidden": 16}, "does not fit"),
    ):
        write_json(tmp_path / "seg" / "segmenter.json", manifest | change)
        with pytest.raises(AoiError, match=message):
            load_segmenter(tmp_path / "seg")
    write_json(tmp_path / "seg" / "segmenter.json", manifest)
    file = tmp_path / "seg" / "head.safetensors"
    assert set(load_file(file)) == set(new_model().decoder.state_dict())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AoiError, match="head.safetensors"):
        load_segmenter(tmp_path / "seg")
