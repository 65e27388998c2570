"Self-distillation: losses by hand, schedules, masks in blocks, a teacher without gradients, a collapse that is seen."

import importlib
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings

import pandas as pd
import pytest
import torch

from aoi_ssl.augment import Augment
from aoi_ssl.core import AoiError, step_seed
from aoi_ssl.crops import store_images
from aoi_ssl.data import channel_stats, load_folder
from aoi_ssl.distill import (
    Branch,
    Head,
    Views,
    _watch,
    block_masks,
    collapse_figures,
    cut_views,
    default_views,
    dino_loss,
    distill,
    draw_masks,
    effective_rank,
    feature_std,
    follow,
    hidden_places,
    is_collapsed,
    keep_one_light,
    new_distillation,
    patch_loss,
    random_boxes,
    sharpen,
    teacher_momentum,
    teacher_temperature,
    update_centre,
    view_batches,
    vit_tokens,
)
from aoi_ssl.encoder import Encoder, ViTEncoder, mae_config, new_vit
from aoi_ssl.pretrain import decay_groups, pretrain

distill_module = importlib.import_module("aoi_ssl.distill")
SMALL = {"encoder": "nano", "crop": 64, "batch_size": 4, "prototypes": 64, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from aoi_ssl.synthetic import render_folder

    path = tmp_path_factory.mktemp("distill") / "parts"
    render_folder(path, devices=0, new_devices=0, pretrain_devices=3, images=3, size=192, progress=False)
    return load_folder(path)["pretrain"]


@pytest.fixture
def model():
    return new_distillation(
        new_vit(mae_config("nano", image_size=64)), objective="ibot", prototypes=16, hidden=32, bottleneck=8
    )


class Noise:
    "A store of crops that show nothing."

    seed = 0

    def batch(self, step, count, *, size, part=slice(None)):
        return torch.rand(count, 2, size, size, generator=seeded(step))[part]


def batches(**options):
    "Batches of noise, with masks."
    options = {"size": 64, "batch_size": 4, "masks": True} | options
    return view_batches(Noise(), default_views(64, 16), ViTEncoder("nano", image_size=64), **options)


# --- losses ---


def test_the_dino_loss_is_the_mean_over_pairs_of_different_views():
    draw = seeded()
    student, teacher = torch.randn(5, 3, 7, generator=draw), torch.randn(2, 3, 7, generator=draw).softmax(-1)
    total, pairs = 0.0, 0
    for g in range(2):
        for v in range(5):
            if g != v:
                for b in range(3):
                    q = (student[v, b] / 0.1).softmax(-1)
                    total -= sum(teacher[g, b, k].item() * math.log(q[k].item()) for k in range(7))
                    pairs += 1
    assert pairs == 24 and math.isclose(dino_loss(student, teacher).item(), total / pairs, rel_tol=1e-4)


def test_the_dino_loss_by_hand():
    teacher = torch.tensor([[[0.25, 0.75]]])
    student = torch.tensor([[[9.0, -9.0]], [[0.0, 0.1 * math.log(3)]]])  # the odds of the second view are 1 : 3
    assert math.isclose(
        dino_loss(student, teacher).item(), -0.25 * math.log(0.25) - 0.75 * math.log(0.75), rel_tol=1e-5
    )


def test_the_patch_loss_is_a_mean_over_each_view_then_over_views():
    answers = torch.eye(2)[[0, 0, 1]]
    cosines = torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.0, 0.0]])  # two patches of one view, one of another
    right, wrong, even = math.log(1 + math.exp(-1)), math.log(1 + math.e), math.log(2)
    loss = patch_loss(cosines, answers, torch.tensor([0.25, 0.25, 0.5]))
    assert math.isclose(loss.item(), ((right + wrong) / 2 + even) / 2, rel_tol=1e-5)


def test_losses_are_float32_whatever_comes_in():
    student, teacher = torch.randn(3, 2, 8), torch.randn(2, 2, 8).softmax(-1)
    for loss in dino_loss(student.bfloat16(), teacher), patch_loss(student[0].bfloat16(), teacher[0], torch.ones(2)):
        assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Head(8, hidden=8, bottleneck=4, prototypes=4)(torch.randn(2, 8)).dtype == torch.float32


def test_centring_follows_the_mean_and_undoes_it():
    centre, cosines = torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    update_centre(centre, cosines, 0.9)
    assert torch.allclose(centre, torch.tensor([0.9 + 0.2, 0.1]))
    same = torch.tensor([0.7, -0.2, 0.1]).expand(6, 3)
    assert torch.allclose(sharpen(same, same[0], 0.04), torch.full((6, 3), 1 / 3))
    sharp, soft = (sharpen(torch.tensor([0.3, 0.1]), torch.zeros(2), t)[0].item() for t in (0.04, 0.07))
    assert math.isclose(sharp, 1 / (1 + math.exp(-5)), rel_tol=1e-5) and soft < sharp


# --- schedules and teacher ---


def test_schedules_start_and_end_where_they_should():
    assert teacher_momentum(0, 0.9) == pytest.approx(0.9) and teacher_momentum(1, 0.9) == 1
    assert teacher_momentum(0.5, 0.9) == pytest.approx(0.95)
    rising = [teacher_temperature(p, start=0.04, end=0.07) for p in (0, 0.15, 0.3, 1)]
    assert rising == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_teacher_is_a_moving_average_of_every_parameter(model):
    before = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    model.progress = 0.5  # of the step that is being ended
    model.after_step(0.6)
    assert model.progress == 0.6
    for old, new in zip(before, model.teacher.parameters(), strict=True):
        assert torch.allclose(new, old + (1 - teacher_momentum(0.5, model.momentum)), atol=1e-6)
    follow(model.teacher, model.student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.teacher.parameters(), model.student.parameters(), strict=True))


def test_the_teacher_never_gets_gradients(model):
    model(batches()(0)).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    moved = {name for name, p in model.student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    fixed = {"vit.embeddings.position_embeddings", "head.prototypes"}  # the prototypes only at the start
    assert {name for name, _ in model.student.named_parameters()} - moved == fixed
    assert model.mask_token.grad.abs().max() > 0
    trained = {id(p) for group in decay_groups(model, weight_decay=0.1) for p in group["params"]}
    assert not trained & {id(p) for p in model.teacher.parameters()}
    model.progress = 0.5
    model(batches()(0)).backward()
    assert model.student.head.prototypes.grad.abs().max() > 0


def test_the_state_of_the_module_is_the_whole_state(model):
    model(batches()(0)).backward()
    with torch.no_grad():
        model.student.head.prototypes.add_(1.0)
    model.after_step(0.4)
    other = new_distillation(
        new_vit(mae_config("nano", image_size=64), seed=3),
        objective="ibot",
        prototypes=16,
        hidden=32,
        bottleneck=8,
        seed=3,
    )
    other.load_state_dict(model.state_dict())
    assert other.progress == 0.4 and other.centre.abs().max() > 0 and other.patch_centre.abs().max() > 0
    assert other(batches()(1)).item() == model(batches()(1)).item()


# --- views ---


def test_views_are_cut_where_the_boxes_are():
    crops = torch.rand(3, 2, 48, 48, generator=seeded())
    whole = torch.tensor([[0.0, 0.0, 1.0]] * 3)
    assert torch.allclose(cut_views(crops, whole, 48), crops, atol=1e-5)
    places = torch.tensor([[0, 0], [12, 24], [24, 6]])
    boxes = torch.cat([torch.cat([places / 48, torch.full((3, 1), 0.5)], dim=1), whole])
    views = cut_views(crops, boxes, 24)
    for crop, view, (y, x) in zip(crops, views, places.tolist(), strict=False):
        assert torch.allclose(view, crop[:, y : y + 24, x : x + 24], atol=1e-5)
    assert torch.allclose(views[3:], torch.nn.functional.avg_pool2d(crops, 2), atol=1e-5)


def test_boxes_fill_the_range_and_stay_inside():
    boxes = random_boxes(4000, (0.05, 0.4), seeded())
    area = boxes[:, 2] ** 2
    assert boxes[:, :2].min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 1
    assert 0.05 <= area.min() < 0.052 and 0.398 < area.max() <= 0.4 and abs(area.mean() - 0.225) < 0.01


def test_a_batch_is_the_same_for_the_same_index_and_no_view_is_another():
    a, b, c = (batches(augment=Augment())(index) for index in (0, 0, 1))
    assert a["global"].shape == (8, 2, 64, 64) and a["local"].shape == (24, 2, 32, 32)
    for name in ("global", "local", "mask", "places", "weights"):
        assert torch.equal(a[name], b[name])
    assert not torch.equal(a["global"], c["global"])
    assert a["crops"] == 4
    views = a["local"].flatten(1)
    assert (torch.cdist(views, views) + 1e3 * torch.eye(24) > 0.1).all()


def test_two_processes_see_what_one_would_have_seen():
    whole = batches(augment=Augment())(1)
    parts = [batches(augment=Augment(), batch_size=2, processes=2)(index) for index in (2, 3)]
    for name, count in ("global", 2), ("local", 6), ("mask", 2):
        both = torch.cat([part[name].unflatten(0, (count, 2)) for part in parts], dim=1).flatten(0, 1)
        assert torch.allclose(both.float(), whole[name].float(), atol=1e-6), name
    assert sum(part["weights"].sum() for part in parts) / 2 == pytest.approx(whole["weights"].sum().item())


def test_views_of_one_light():
    a, dropped, repeated = (batches(lights=lights)(0) for lights in ("both", "dropped", "repeated"))
    first, second = a["global"].unflatten(0, (2, 4))
    assert torch.equal(dropped["global"][:4, 0], first[:, 0]) and dropped["global"][:4, 1].abs().max() == 0
    assert torch.equal(dropped["global"][4:, 1], second[:, 1]) and dropped["global"][4:, 0].abs().max() == 0
    assert torch.equal(repeated["global"][:4], first[:, :1].expand(-1, 2, -1, -1))
    assert torch.equal(repeated["global"][4:], second[:, 1:].expand(-1, 2, -1, -1))
    assert all(torch.equal(a["local"], other["local"]) for other in (dropped, repeated))
    assert keep_one_light(torch.ones(6, 2, 1, 1), 2, repeat=False).flatten(1).sum(0).tolist() == [4, 2]


def test_default_views_are_those_of_dino_at_224():
    assert default_views(224, 16) == Views(global_size=224, local_size=96)
    assert default_views(64, 16).local_size == 32 and default_views(32, 16).local_size == 32
    assert default_views(64, 8).local_size == 24


# --- masks ---


@pytest.mark.parametrize("side", [2, 3, 7, 14, 28])
def test_masks_have_exactly_the_share_that_is_asked_for(side):
    counts = torch.arange(0, side * side + 1, max(1, side * side // 9))
    masks = block_masks(counts, side, seeded())
    assert masks.shape == (len(counts), side * side) and masks.sum(1).tolist() == counts.tolist()


def test_masks_lie_in_blocks():
    "Nearly every hidden patch has two hidden neighbours or more; single patches have not."

    def joined(masks):
        m = torch.nn.functional.pad(masks.unflatten(1, (14, 14)), (1, 1, 1, 1))
        near = [m[:, 1 + dy : 15 + dy, 1 + dx : 15 + dx] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return (torch.stack(near).sum(0) >= 2)[masks.unflatten(1, (14, 14))].float().mean().item()

    blocks = block_masks(torch.full((64,), 59), 14, seeded())
    single = torch.rand(64, 196, generator=seeded()).argsort(1) < 59
    assert joined(blocks) > 0.9 and joined(single) < 0.5
    assert len(blocks.unique(dim=0)) == 64
    often = block_masks(torch.full((2000,), 59), 14, seeded()).float().mean(0)
    assert often.min() > 0.2 and often.max() < 0.4, "the border is hidden nearly as often as the middle"


def test_half_of_the_views_are_masked_by_10_to_50_percent():
    mask = draw_masks(40, 14, seeded())
    share, found = mask.float().mean(1), hidden_places(mask)
    hidden = share[share > 0]
    assert len(hidden) == 20 and 0.09 < hidden.min() < 0.2 and 0.4 < hidden.max() < 0.51
    assert torch.equal(found["places"], mask.flatten().nonzero().flatten()) and torch.equal(found["mask"], mask)
    per_view = torch.zeros(40).index_add(0, found["places"] // 196, found["weights"])
    assert torch.allclose(per_view, (share > 0) / 20)
    assert torch.allclose(hidden_places(mask[:10], 10.0)["weights"].sum(), (share[:10] > 0).sum() / 10)
    assert draw_masks(1, 2, seeded()).sum() >= 1


def test_the_patch_loss_looks_at_hidden_patches_alone(model):
    pixels, mask = torch.randn(4, 2, 64, 64, generator=seeded()), draw_masks(4, 4, seeded())
    places = hidden_places(mask)["places"]
    _, chosen = model.student(pixels, places, mask, model.mask_token)
    tokens = vit_tokens(model.student.vit, pixels, mask, model.mask_token)[:, 1:]
    assert torch.allclose(chosen, model.student.head(tokens[mask]), atol=1e-5)


def test_what_is_hidden_is_not_seen(model):
    pixels, mask = torch.randn(2, 2, 64, 64, generator=seeded()), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5] = True
    other = pixels.clone()
    other[:, :, 16:32, 16:32] += 3.0  # patch 5: second row, second column
    seen = [vit_tokens(model.student.vit, x, mask, model.mask_token) for x in (pixels, other)]
    assert torch.equal(*seen)
    assert not torch.allclose(*(vit_tokens(model.student.vit, x) for x in (pixels, other)))


def test_tokens_are_those_of_the_encoder_at_any_size():
    encoder, pixels = ViTEncoder("nano", image_size=64), torch.randn(2, 2, 32, 48)
    assert torch.allclose(vit_tokens(encoder.vit, pixels)[:, 1:], encoder.embed(pixels).flatten(1, 2), atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_what_stands_for_a_view(pool):
    branch = Branch(
        new_vit(mae_config("nano", image_size=64)), Head(48, hidden=8, bottleneck=4, prototypes=4), pool=pool
    )
    pixels = torch.randn(2, 2, 64, 64)
    tokens = vit_tokens(branch.vit, pixels)
    whole = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    assert torch.allclose(branch(pixels)[0], branch.head(whole), atol=1e-6)


# --- collapse ---


def test_figures_by_hand():
    assert effective_rank(torch.eye(6)[:4]) == pytest.approx(4) and effective_rank(torch.zeros(3, 3)) == 0
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert feature_std(torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])) == pytest.approx(1)  # variances 1 and 0, times 2
    answers = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]])
    found = collapse_figures(torch.randn(4, 2, 8), answers)
    assert found["teacher_entropy"] == pytest.approx(0.25)  # half of the answers lack one of two bits
    assert found["information"] == pytest.approx(
        1.5 * math.log(2)
    )  # the mean answer has two bits, each answer half a bit


def test_both_collapses_are_seen_and_a_good_teacher_is_not_accused():
    good = torch.randn(8, 16, 48)
    assert not is_collapsed(collapse_figures(good, torch.eye(32)[:8]))
    assert is_collapsed(collapse_figures(good, torch.eye(32)[:1].expand(8, 32)))
    assert is_collapsed(collapse_figures(good, torch.full((8, 32), 1 / 32)))
    assert is_collapsed(collapse_figures(good[:1].expand(8, -1, -1))), "differs by place alone"
    assert is_collapsed(collapse_figures(torch.outer(torch.randn(8 * 16), torch.randn(48)).unflatten(0, (8, 16))))


def test_a_constant_encoder_is_noticed_once(model):
    with torch.no_grad():
        model.teacher.vit.embeddings.patch_embeddings.projection.weight.zero_()
    after_step = _watch(model, ViTEncoder(model.teacher.vit), torch.rand(4, 2, 64, 64))
    model.momentum = 1.0  # it stays constant
    assert after_step(0.01) is None
    assert after_step(0.05)["collapsed"] == 1  # seen, but a run that has just begun is not accused
    with pytest.warns(UserWarning, match="ibot is collapsing after 26% of the budget: effective_rank 0, feature_std 0"):
        after_step(0.26)
    with warnings.catch_warnings(action="error"):
        assert after_step(0.5)["feature_std"] < 1e-6 and after_step(0.51) is None


def test_patience_is_for_a_collapse_and_for_nothing_else(images, tmp_path):
    "Answers that are never sharpened say nothing: given up at the first quarter, or two looks after it, also when resumed in between."
    bad = SMALL | {"budget": "40 steps", "temperature": (1.0, 1.0)}
    good = distill(images, **SMALL, budget="40 steps", patience=1)
    assert len(good.history) == 40 and not good.history.collapsed.any()
    with pytest.warns(UserWarning, match="dino is stopped after 25% of the budget: 2 looks in a row found a collapse"):
        assert len(distill(images, **bad, patience=2).history) == 10
    with pytest.warns(UserWarning, match="stopped after 35%"):
        whole = distill(images, **bad, patience=7)
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(action="ignore"):
        distill(images, tmp_path / "out", augment=stop_at(11), **bad, patience=7)
    with pytest.warns(UserWarning, match="stopped after 35%"):
        resumed = distill(images, tmp_path / "out", resume=True, **bad, patience=7)
    assert len(whole.history) == 14 and resumed.history.loss.equals(whole.history.loss)
    for patience in (0, 20, 1.5):
        with pytest.raises(AoiError, match=rf"patience is {patience}; a whole number from 1 to 19"):
            distill(images, **SMALL, budget="1 steps", patience=patience)


def test_it_is_looked_at_on_held_out_images_where_there_are_some(images):
    seen, held_out = images.select([0, 1]), images.select([2, 3])
    a, b = (distill(seen, **SMALL, budget="2 steps", validation=given).history for given in (None, held_out))
    assert a.loss.equals(b.loss) and not a.effective_rank.equals(b.effective_rank)
    with warnings.catch_warnings(action="error"):
        one = distill(seen, **(SMALL | {"batch_size": 1}), budget="3 steps").history
    assert one.feature_std.iloc[0] > 0.05, "a batch of one crop is no collapse"


# --- runs ---


def stop_at(step):
    class Impatient(Augment):
        def __call__(self, *args, seed, **options):
            if seed == step_seed(0, step, 64, 1):  # the global views
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*args, seed=seed, **options)

    return Impatient()


@pytest.mark.parametrize("objective", ["dino", "ibot"])
def test_ctrl_c_saves_and_the_resumed_run_is_the_unbroken_one(images, tmp_path, objective):
    out, options = tmp_path / "encoder", SMALL | {"objective": objective, "budget": "8 steps"}
    whole = distill(images, **options)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        distill(images, out, augment=stop_at(4), **options)
    assert not out.exists()
    with pytest.raises(AoiError, match="did not end"):
        distill(images, out, **options)
    with pytest.raises(AoiError, match="Resume with the same settings"):
        distill(images, out, resume=True, **(options | {"lights": "dropped"}))
    resumed = distill(images, out, resume=True, **options)
    assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    for (name, a), b in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.encoder.fingerprint() == whole.encoder.fingerprint() == Encoder.from_pretrained(out).fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


def test_one_seed_one_result(images):
    a, b, c = (distill(images, **SMALL, budget="2 steps", seed=s) for s in (0, 0, 1))
    assert a.encoder.fingerprint() == b.encoder.fingerprint() != c.encoder.fingerprint()


def test_the_result_is_the_teachers_encoder_with_the_statistics_of_the_images(images, tmp_path):
    result = distill(images, tmp_path / "encoder", **SMALL, budget="3 steps")
    mean, std = channel_stats(images)
    assert result.encoder.vit is result.model.teacher.vit and not result.encoder.training
    assert torch.allclose(result.encoder.mean, mean) and torch.allclose(result.encoder.std, std)
    x = torch.rand(1, 2, 80, 70)
    assert torch.equal(Encoder.from_pretrained(tmp_path / "encoder").encode(x), result.encoder.encode(x))
    files = sorted(p.name for p in (tmp_path / "encoder").iterdir() if not p.name.startswith("."))
    assert files == ["config.json", "encoder.json", "history.csv", "model.safetensors", "snapshots"]
    more = pretrain(
        images, encoder="nano", crop=64, batch_size=2, budget="1 steps", progress=False, start_from=tmp_path / "encoder"
    )
    assert more.mae.config.hidden_size == 48, "masked autoencoding can go on from it"


@pytest.mark.parametrize("objective", ["dino", "ibot"])
def test_it_learns_and_does_not_collapse(images, objective):
    "The teacher's answers say more and more of the crop, and the student does better than one who guesses evenly."
    with warnings.catch_warnings(action="error"):
        history = distill(
            images, **(SMALL | {"batch_size": 8}), objective=objective, budget="50 steps", base_lr=1.6e-2
        ).history
    watched = history.dropna(subset="effective_rank")
    assert len(watched) == 20 and not watched.collapsed.any()
    assert history.loss.tail(10).mean() < (2 if objective == "ibot" else 1) * math.log(64) - 0.1
    assert watched.information.iloc[-1] > 1.5 * watched.information.iloc[0]


def test_bf16_gives_nearly_the_same_losses(images):
    a, b = (
        distill(images, **SMALL, objective="ibot", budget="3 steps", precision=p).history.loss for p in ("fp32", "bf16")
    )
    assert (a - b).abs().max() < 0.05 and not a.equals(b)


def test_crops_that_are_decoded_already_give_the_same_run(images):
    crops = store_images(images, cell=64)
    a, b = (distill(images, **SMALL, budget="2 steps", crops=given) for given in (None, crops))
    assert a.history.loss.equals(b.history.loss)


def test_two_processes_have_the_losses_of_one(folder, tmp_path):
    options = SMALL | {"objective": "ibot", "budget": "3 steps"}
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(f"""
        from accelerate import PartialState
        from aoi_ssl.data import load_folder
        from aoi_ssl.distill import distill

        main = PartialState(cpu=True).is_main_process
        result = distill(load_folder({str(folder)!r})["train"], **({options!r} | {{"batch_size": 2, "progress": True}}))
        if main:
            result.history.to_csv({str(tmp_path / "two.csv")!r})
    """)
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, check=True, env=environment, capture_output=True, text=True, timeout=120)
    assert len(re.findall(r"About \d+ images a second: 3 steps of 4", run.stdout)) == 1, "said once, measured by both"
    two, one = pd.read_csv(tmp_path / "two.csv"), distill(load_folder(folder)["train"], **options).history
    assert torch.allclose(torch.tensor(two.loss.tolist()), torch.tensor(one.loss.tolist()), atol=1e-4)


def test_the_machinery_stays_off_the_labels(folder, monkeypatch):
    import aoi_ssl.data as data

    labelled = load_folder(folder)["train"]
    monkeypatch.setattr(data, "read_mask", lambda *a, **k: pytest.fail("a mask was read"))
    distill(labelled, **SMALL, budget="1 steps")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objective": "mae"}, "objective is 'mae'; one of dino, ibot"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"lights": "one"}, "lights is 'one'; one of both, dropped, repeated"),
        (
            {"views": Views(global_size=64, local_size=24)},
            "local_size is 24; a multiple of the patch size 16 .* Try 32",
        ),
        ({"crop": 320}, "smaller than a crop of 320"),
        ({"budget": "soon"}, "no budget"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"encoder": "huge"}, "no encoder preset"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"base_lr": float("nan")}, "base_lr is nan; a finite number above 0"),
        ({"base_lr": -1e-3}, "base_lr is -0.001"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; a finite number from 0"),
        ({"warmup": 2.0}, "warmup is 2.0; a finite number from 0 to 1"),
        ({"report_to": "paper"}, "report_to is 'paper'"),
        ({"momentum": 1.5}, "momentum is 1.5; a finite number from 0 to 1"),
        ({"temperature": (0.04, 0.0)}, "temperature is 0.0; a finite number above 0"),
        ({"prototypes": 1}, "prototypes is 1; a whole number from 2"),
    ],
)
def test_wrong_plans_are_refused_before_an_image_is_read(images, wrong, message, monkeypatch):
    monkeypatch.setattr("aoi_ssl.data.read_native", lambda *a, **k: pytest.fail("an image was read"))
    with pytest.raises(AoiError, match=message):
        distill(images, **(SMALL | {"budget": "1 steps"} | wrong))


def test_views_that_are_none_are_refused():
    with pytest.raises(AoiError, match="fewer than two views or no global one"):
        Views(global_views=1, local_views=0)
    with pytest.raises(AoiError, match=r"local_scale is \(0.4, 0.1\)"):
        Views(local_scale=(0.4, 0.1))


def test_the_options_that_pretrain_has_mean_the_same_here():
    theirs, ours = (inspect.signature(f).parameters for f in (pretrain, distill))
    shared = set(theirs) & set(ours) - {"base_lr", "encoder", "patch_size"}  # None there: the shape of the weights to go on from
    assert ours["encoder"].default == "tiny" and ours["patch_size"].default == 16
    assert {
        "crop",
        "validation",
        "patience",
        "batch_size",
        "weight_decay",
        "warmup",
        "augment",
        "budget",
        "seed",
        "resume",
    } <= shared
    for name in shared:
        assert theirs[name].default == ours[name].default, name
