"Which images to label next: covering by hand, and what must hold whatever the images."

import pytest
import torch

from aoi_ssl.core import AoiError
from aoi_ssl.encoder import PixelEncoder
from aoi_ssl.remember import remember_image
from aoi_ssl.retrieval import MemoryBank, empty_bank
from aoi_ssl.suggest import greedy_cover, suggest_next
from aoi_ssl.teach import teach

ENCODER = PixelEncoder(channels=1, patch_size=4, mean=[0.5], std=[0.3])


def family(kind, count):
    "Images that differ little: noise over a texture of their own."
    texture = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(kind)).repeat(1, 5, 5)
    noise = torch.rand(count, 1, 20, 20, generator=torch.Generator().manual_seed(100 + kind))
    return {f"k{kind}_{n}": 0.9 * texture + 0.1 * one for n, one in enumerate(noise)}


def bank_of(images):
    parts = [remember_image({"image": i, "mask": i > 2, "ignore": None}, ENCODER, number=n) for n, i in enumerate(images.values())]
    records = [{"stem": name, "device": "d", "height": 20, "width": 20, "classes": []} for name in images]
    return MemoryBank(ENCODER, ["wire"], {name: torch.cat([p[name] for p in parts]) for name in parts[0]}, records)


FOLDER = family(1, 5) | family(2, 3) | family(3, 1)


def test_each_kind_once_before_any_twice():
    table = suggest_next(FOLDER, 5, encoder=ENCODER)
    assert sorted(name[:2] for name in table["stem"][:3]) == ["k1", "k2", "k3"]
    assert table["stem"].is_unique and table["score"].is_monotonic_decreasing and 0.8 < table["score"].sum() <= 1
    assert [list(FOLDER)[row] for row in table["row"]] == table["stem"].tolist()
    assert table["reason"][0] == "most typical of all"


def test_what_the_bank_knows_is_not_suggested():
    bank = bank_of({name: FOLDER[name] for name in ("k1_0", "k2_0")})
    table = suggest_next(FOLDER, 7, bank=bank)
    assert table["stem"][0] == "k3_0" and not set(table["stem"]) & {"k1_0", "k2_0"}
    assert table["novelty"][0] > 2 * table["novelty"][1:].max() and table["reason"][0] == "unlike the bank, and like no other"
    with pytest.raises(AoiError, match="1 to 7"):
        suggest_next(FOLDER, 8, bank=bank)
    with pytest.raises(AoiError, match="n is 0"):
        suggest_next(FOLDER, 0, bank=bank)


def test_the_same_images_give_the_same_answer():
    first, again = (suggest_next(FOLDER, 4, encoder=ENCODER) for _ in range(2))
    assert first.equals(again) and first["stem"].tolist() == suggest_next(FOLDER, 9, encoder=ENCODER)["stem"].tolist()[:4]


def test_an_empty_bank_will_do():
    table = suggest_next(FOLDER, 3, bank=empty_bank(FOLDER, ENCODER, ["wire"], method="paper"))
    assert sorted(name[:2] for name in table["stem"]) == ["k1", "k2", "k3"]
    with pytest.raises(AoiError, match="encoder="):
        suggest_next(FOLDER)


def test_greedy_is_the_best_single_image():
    generator = torch.Generator().manual_seed(0)
    distances, known = torch.rand(6, 40, generator=generator), torch.rand(40, generator=generator)
    best = min(range(6), key=lambda i: torch.minimum(known, distances[i]).sum().item())
    (first, gain), *_ = greedy_cover(distances, known, 2)
    assert first == best and torch.allclose(gain, known - torch.minimum(known, distances[best]))


def test_teach_suggests_what_is_unlabelled():
    handle = teach(FOLDER, ENCODER, classes=["wire"], method="paper", journal=None)  # repeated textures are nothing but their mean
    assert handle.names[handle.suggest()] == handle.suggestions()["stem"][0] and "typical" in handle.reason
    handle.go(handle.suggest()).paint("wire", "line", [(2, 2), (12, 12)], size=3).rest()
    second = handle.suggest()
    assert handle.names[second][:2] != handle.names[handle.index][:2] and "unlike the bank" in handle.reason
    handle._handle_custom_msg({"kind": "suggest"}, [])
    assert handle.index == second and handle.reason in handle.state["hint"] and handle.error == ""


def test_an_image_like_one_above_comes_once_and_last():
    first, third = family(1, 1)["k1_0"], family(2, 1)["k2_0"]
    table = suggest_next({"a": first, "b": first, "c": third}, 3, encoder=ENCODER)
    assert table["row"].tolist() == [0, 2, 1] and table["helps"].tolist() == [1, 0, 0]
    assert table["score"].iloc[2] < 1e-6 and table["reason"].iloc[2] == "nothing in it is unknown any more"
    assert [image for image, _ in greedy_cover(torch.zeros(3, 4), torch.zeros(4), 3)] == [0, 1, 2]
