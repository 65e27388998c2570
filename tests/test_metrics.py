import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import multilabel_jaccard_index, multilabel_precision, multilabel_recall

from aoi_ssl.core import AoiError
from aoi_ssl.metrics import (
    THRESHOLDS,
    best_thresholds,
    binary_counts,
    counts_frame,
    mean_iou,
    scores,
    threshold_counts,
)

CLASSES = ["wire", "ball", "wedge"]


def random_case(seed: int = 0, shape=(4, 3, 20, 30)):
    rng = torch.Generator().manual_seed(seed)
    target = torch.rand(shape, generator=rng) < torch.tensor([0.4, 0.2, 0.03]).reshape(3, 1, 1)
    probabilities = (0.4 * target + 0.3 * torch.rand(shape, generator=rng) + 0.1).clamp(0, 1)
    return probabilities, target, torch.rand(shape, generator=rng) < 0.2


def test_counts_by_hand():
    pred = torch.tensor([[[1, 1, 1, 0, 0]], [[0, 0, 0, 0, 0]]]).bool()
    target = torch.tensor([[[1, 1, 0, 1, 0]], [[0, 1, 0, 0, 0]]]).bool()
    assert binary_counts(pred, target).tolist() == [[2, 1, 1], [0, 0, 1]]
    assert binary_counts(torch.stack([pred] * 3), torch.stack([target] * 3)).tolist() == [[6, 3, 3], [0, 0, 3]]


def test_class_axis_is_not_the_batch_axis():
    pred = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    pred[:, 1] = True
    assert binary_counts(pred, torch.zeros_like(pred)).tolist() == [[0, 0, 0], [0, 32, 0], [0, 0, 0]]


def test_ignored_pixels_are_in_no_count():
    probabilities, target, ignore = random_case()
    wrong_there = torch.where(ignore, ~target, target)
    counts = binary_counts(wrong_there, target, ignore)
    assert counts[:, 1:].sum() == 0 and torch.equal(counts[:, 0], (target & ~ignore).sum((0, 2, 3)))
    flipped = torch.where(ignore, 1 - probabilities, probabilities)
    assert torch.equal(threshold_counts(probabilities, target, ignore), threshold_counts(flipped, target, ignore))
    assert not torch.equal(threshold_counts(probabilities, target), threshold_counts(flipped, target))


def test_ignore_of_one_class_spares_the_others():
    pred, target = torch.ones(2, 4, 4).bool(), torch.zeros(2, 4, 4).bool()
    ignore = torch.zeros(2, 4, 4).bool()
    ignore[0] = True
    assert binary_counts(pred, target, ignore).tolist() == [[0, 0, 0], [0, 16, 0]]


@pytest.mark.parametrize("floats", [torch.randn(3, 4, 4), torch.rand(3, 4, 4)])
def test_floats_are_no_masks(floats):
    with pytest.raises(AoiError, match="sigmoid"):
        binary_counts(floats, torch.zeros(3, 4, 4, dtype=torch.bool))


def test_logits_are_no_probabilities():
    "A logit of 0.4 is a probability of 0.6; compared with 0.5 it would be dropped."
    target = torch.ones(1, 1, 2).bool()
    logits = torch.tensor([[[0.4, 3.0]]])
    assert threshold_counts(torch.sigmoid(logits), target, thresholds=torch.tensor([0.5]))[0, 0].tolist() == [2, 0, 0]
    with pytest.raises(AoiError, match="sigmoid"):
        threshold_counts(logits, target)
    with pytest.raises(AoiError, match="expected"):
        threshold_counts(torch.tensor([[[0.4, float("nan")]]]), target)


def test_shapes_must_agree():
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(AoiError, match="target"):
        binary_counts(mask, mask[:1])
    with pytest.raises(AoiError, match="ignore"):
        binary_counts(mask, mask, mask[0])
    with pytest.raises(AoiError, match="bool"):
        threshold_counts(mask.float(), mask.int())
    with pytest.raises(AoiError, match="same order"):
        counts_frame(binary_counts(mask, mask), ["wire"])


def test_agrees_with_torchmetrics():
    probabilities, target, _ = random_case(1)
    table = scores(counts_frame(binary_counts(probabilities > 0.5, target), CLASSES))
    options = {"num_labels": 3, "threshold": 0.5, "average": None}
    assert np.allclose(table["iou"], multilabel_jaccard_index(probabilities, target.int(), **options), atol=1e-6)
    assert np.allclose(table["precision"], multilabel_precision(probabilities, target.int(), **options), atol=1e-6)
    assert np.allclose(table["recall"], multilabel_recall(probabilities, target.int(), **options), atol=1e-6)
    assert np.allclose(table["dice"], 2 * table["iou"] / (1 + table["iou"]))


def test_counts_are_summed_before_they_are_divided():
    "The published mean over batches skips the class where it is absent, and its false positives with it."
    frame = pd.concat([
        counts_frame(torch.tensor([[90, 10, 0]]), ["wedge"], stem="a"),
        counts_frame(torch.tensor([[0, 100, 0]]), ["wedge"], stem="b"),
    ])
    assert scores(frame)["iou"].item() == pytest.approx(90 / 200)
    assert mean_iou(frame) == pytest.approx(90 / 200)
    per_image = scores(frame, by="stem")
    assert per_image["iou"].tolist() == pytest.approx([0.9, 0.0])
    assert per_image.loc[per_image["support"] > 0, "iou"].mean() == pytest.approx(0.9)  # what it would have said


def test_absent_classes():
    frame = counts_frame(torch.tensor([[5, 0, 5], [0, 7, 0], [0, 0, 0]]), CLASSES)
    wire, ball, wedge = scores(frame).to_dict("records")
    assert (wire["iou"], wire["support"]) == (0.5, 10)
    assert ball["iou"] == ball["dice"] == ball["precision"] == 0 and np.isnan(ball["recall"])
    assert np.isnan(wedge["iou"]) and np.isnan(wedge["dice"]) and np.isnan(wedge["precision"])
    assert mean_iou(frame) == pytest.approx(0.25)  # absent and predicted is 0, absent and not predicted is left out
    assert np.isnan(mean_iou(counts_frame(torch.zeros(3, 3, dtype=torch.int64), CLASSES)))


def test_groups():
    frame = pd.concat([
        counts_frame(torch.tensor([[1, 0, 1], [2, 2, 0], [0, 0, 0]]), CLASSES, device=d, method=None) for d in "aab"
    ])
    table = scores(frame, by=("device", "class"))
    assert table[["device", "class"]].values.tolist() == [[d, c] for d in "ab" for c in CLASSES]
    assert table["tp"].tolist() == [2, 4, 0, 1, 2, 0]
    assert mean_iou(frame, by="device").to_dict() == {"a": 0.5, "b": 0.5}
    assert len(scores(frame, by=("method", "class"))) == 3  # a missing label is a group, too
    assert scores(frame, by=())["tp"].tolist() == [9]
    with pytest.raises(AoiError, match="lights"):
        scores(frame, by="lights")


@pytest.mark.parametrize("with_ignore", [False, True])
def test_histogram_equals_the_loop(with_ignore):
    p, target, ignore = random_case(2)
    p[:, :, :5] = torch.cat([torch.tensor([0.0, 1.0]), THRESHOLDS])[:30]  # values that are thresholds
    ignore = ignore if with_ignore else None
    slow = torch.stack([binary_counts(p > t, target, ignore) for t in THRESHOLDS])
    assert torch.equal(threshold_counts(p, target, ignore), slow)
    singly = sum(threshold_counts(p[i], target[i], ignore[i] if with_ignore else None) for i in range(len(p)))
    assert torch.equal(singly, slow)


def test_thresholds_are_exclusive_and_must_rise():
    p = torch.full((1, 1, 1), 0.5)
    counts = threshold_counts(p, torch.ones(1, 1, 1).bool(), thresholds=torch.tensor([0.4999, 0.5]))
    assert counts[:, 0, 0].tolist() == [1, 0]
    with pytest.raises(AoiError, match="rise"):
        threshold_counts(p, torch.ones(1, 1, 1).bool(), thresholds=torch.tensor([0.5, 0.4]))


def test_best_threshold_is_the_middle_of_the_longest_plateau():
    t = torch.arange(1, 9) / 10
    tp = torch.tensor([5, 9, 9, 5, 9, 9, 9, 5])
    counts = torch.stack([tp, torch.zeros(8).long(), 10 - tp], -1)[:, None]
    assert best_thresholds(counts, t).item() == pytest.approx(0.6)


def test_class_that_no_threshold_finds_is_never_predicted():
    t = torch.tensor([0.2, 0.5])
    absent, missed = [[0, 9, 0], [0, 0, 0]], [[0, 9, 5], [0, 0, 5]]
    best = best_thresholds(torch.tensor([absent, missed]).transpose(0, 1), t)
    assert best.tolist() == [1.0, 1.0]
    assert not (torch.ones(2, 3, 3) > best[:, None, None]).any()
    with pytest.raises(AoiError, match="2 thresholds"):
        best_thresholds(torch.zeros(3, 1, 3), t)


def test_best_threshold_maximises_iou():
    p, target, _ = random_case(3)

    def iou(threshold):
        return scores(counts_frame(binary_counts(p > threshold, target), CLASSES))["iou"].to_numpy()

    best = best_thresholds(threshold_counts(p, target))
    assert np.allclose(iou(best[:, None, None]), np.max([iou(t) for t in THRESHOLDS], axis=0))
