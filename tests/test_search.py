"Nearest keys and their masks: exactness, rows that stay right, bounded memory, what a coreset covers."

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from aoi_ssl import search
from aoi_ssl.core import AoiError
from aoi_ssl.search import (
    KEY_TYPES,
    ExactIndex,
    IVFIndex,
    MaskRows,
    aggregate,
    build_index,
    cast_votes,
    cluster,
    coreset,
    decode_keys,
    distinct_masks,
    encode_keys,
    faiss_bytes,
    index_bytes,
    insertion_distances,
    load_index,
    pack_bits,
    shown_classes,
    top_k,
)


def unit(count: int, dim: int = 32, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def clouds(count: int, dim: int = 32, seed: int = 0) -> torch.Tensor:
    "Keys in 60 clouds of very different size, as patches of a device are."
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(60, generator=g) ** 4
    middle = F.normalize(torch.randn(60, dim, generator=torch.Generator().manual_seed(99)), dim=1)
    place = middle[torch.multinomial(share, count, replacement=True, generator=g)]
    return F.normalize(place + 0.12 * torch.randn(count, dim, generator=g), dim=1)


@pytest.fixture(scope="module")
def keys():
    return clouds(6000)


@pytest.fixture(scope="module")
def queries():
    return clouds(300, seed=1)


def recall(queries, keys, rows, k):
    "The share of the k nearest that were found, by value."
    least = (queries @ keys.T).topk(k).values[:, -1:]
    return ((queries[:, None] * keys[rows]).sum(-1) >= least - 1e-6).float().mean().item()


INDICES = {"exact": ExactIndex, "ivf": lambda keys, **options: IVFIndex(keys, lists=40, **options)}
both = pytest.mark.parametrize("make", INDICES.values(), ids=INDICES)


# --- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 5), (2**14 + 77, 1), (2**14 + 77, 30), (5000, 300), (40, 100)])
def test_exact_search_is_the_sort_of_all_products(n, k):
    keys, queries = unit(n, 8), unit(37, 8, seed=1)
    products = queries.double() @ keys.double().T
    best, order = (column[:, :k] for column in products.sort(1, descending=True))
    for similarity, rows in (top_k(queries, keys, k), ExactIndex(keys).search(queries, k)):
        assert torch.allclose(similarity.double(), best, atol=1e-6)
        assert torch.allclose(products.gather(1, rows), best, atol=1e-6)
        assert (rows == order).float().mean() > 0.99 and all(len(set(row)) == min(k, n) for row in rows.tolist())


@pytest.mark.parametrize("k", [1, 3, 20])
def test_groups_that_are_all_alike_hide_nothing(k):
    "The best k may all be in one group, or be equal, or be in the last, incomplete group."
    similarity = torch.zeros(5, 4003)
    similarity[0, torch.arange(k) * 126] = 1.0  # one group: a group is every 126th column
    similarity[1] = 0.5
    similarity[2, -k:] = torch.arange(1, k + 1) / k
    similarity[3] = -torch.arange(4003).float()
    similarity[4, :k] = -1
    found, column = search._block_top_k(similarity, k)
    assert found.equal(similarity.topk(k).values)
    assert similarity.gather(1, column).equal(found)
    assert all(len(set(row.tolist())) == k for row in column)


@both
def test_equal_keys_are_all_found(make):
    keys = unit(50)[torch.arange(50).repeat_interleave(6)]
    similarity, rows = make(keys).search(unit(50), 6)
    assert torch.allclose(similarity, torch.ones(50, 6), atol=1e-3)
    assert (rows.sort(1).values == torch.arange(300).view(50, 6)).all()


@both
def test_all_the_keys_when_k_is_more(make, keys):
    similarity, rows = make(keys[:60]).search(keys[:7], 100)
    assert rows.shape == (7, 60) and (rows.sort(1).values == torch.arange(60)).all()
    assert (similarity.diff(dim=1) <= 1e-6).all() and torch.isfinite(similarity).all()


@both
def test_nothing_asked_and_nothing_there(make, keys):
    assert make(keys).search(keys[:0], 3)[1].shape == (0, 3)
    index = make(keys[:100])
    index.remove(torch.arange(100))
    assert len(index) == 0 and index.search(keys[:4], 3)[1].shape == (4, 0)
    index.add(keys[:5])
    assert index.search(keys[:5], 1)[1].flatten().tolist() == [0, 1, 2, 3, 4]


# --- keys in fewer bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size", "least"), [("float16", 64, 0.99), ("int8", 36, 0.97)])
def test_short_keys_find_nearly_the_same(dtype, size, least, keys, queries):
    index = ExactIndex(keys, dtype=dtype)
    assert index.nbytes == size * len(keys) and index.dtype == dtype
    assert recall(queries, keys, index.search(queries, 10)[1], 10) >= least
    assert (index.keys() * keys).sum(1).min() > 0.999


def test_int8_keys_have_length_one_and_survive_a_second_rounding():
    keys = torch.cat([unit(200), torch.eye(32), torch.zeros(1, 32)])  # one number only; nothing at all
    codes, scale = encode_keys(keys)
    decoded = decode_keys(codes, scale)
    assert torch.allclose(decoded.norm(dim=1)[:-1], torch.ones(232)) and not decoded[-1].any()
    assert encode_keys(decoded)[0].equal(codes)
    assert codes[:-1].abs().amax(1).eq(127).all()


def test_a_type_that_does_not_exist():
    with pytest.raises(AoiError, match="int4.*float32, float16, int8"):
        ExactIndex(unit(3), dtype="int4")


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KEY_TYPES)
def test_lists_find_nearly_all_and_look_at_little(dtype, keys, queries):
    index = IVFIndex(keys, dtype=dtype, reach=1.5)
    similarity, rows = index.search(queries, 5)
    assert recall(queries, keys, rows, 5) > 0.92
    assert torch.allclose(similarity, (queries[:, None] * index.keys()[rows]).sum(-1), atol=1e-5)
    query, lists = search._probe(queries, index.centres, 1.5)
    assert index.bounds.diff()[lists].sum() < 0.3 * len(queries) * len(keys)


def test_a_reach_over_everything_is_exact(keys, queries):
    index = IVFIndex(keys, dtype="float32", lists=16, reach=100)  # 16 lists are all searched
    for k in (1, 7, 40):
        assert index.search(queries, k)[0].allclose((queries @ keys.T).topk(k).values, atol=1e-5)


def test_a_longer_reach_misses_less(keys, queries):
    index, found = IVFIndex(keys, dtype="float32"), []
    for reach in (1.0, 1.5, 3.0):
        index.reach.fill_(reach)
        found.append(recall(queries, keys, index.search(queries, 5)[1], 5))
    assert found[0] < found[1] < found[2]


def test_lists_that_are_too_short_are_no_excuse(keys):
    "More neighbours than the nearest lists hold: the query is searched again, exactly."
    index = IVFIndex(keys, dtype="float32", lists=300, reach=1.0)
    similarity, rows = index.search(keys[:20], 2000)
    assert (rows >= 0).all() and similarity.allclose((keys[:20] @ keys.T).topk(2000).values, atol=1e-5)


@pytest.mark.parametrize("options", [None, {"lists": 16, "reach": 100}, {"lists": 300, "reach": 1.0}])
def test_nobody_finds_its_own_fold(options, keys, queries):
    "Fold -1 is found by nobody. Wide lists and the exact index agree with a scan of what is left; short lists fall back on it."
    index, k = IVFIndex(keys, dtype="float32", **options) if options else ExactIndex(keys), 400
    folds, own = torch.arange(len(keys)) % 3 - 1, torch.arange(len(queries)) % 2
    similarity, rows = index.search(queries, k, apart=(folds, own))
    assert (folds[rows] == 1 - own[:, None]).all()
    for fold in (0, 1):
        expected = queries[own == fold] @ keys[folds == 1 - fold].T
        assert similarity[own == fold].allclose(expected.topk(k).values, atol=1e-5) or (options and options["reach"] == 1)
    few = torch.full_like(folds, -1).index_fill(0, torch.arange(5), 0)
    assert (index.search(queries, 9, apart=(few, own))[1] >= 0).sum(1).tolist() == [5 * (n == 1) for n in own]


def test_lists_take_no_second_copy_of_the_keys(keys):
    half = keys.half()
    index = IVFIndex(half)
    assert index.codes.data_ptr() == half.data_ptr()
    assert index.nbytes - half.nbytes < 8 * len(keys) + index.centres.nbytes + index.bounds.nbytes


def test_a_small_budget_changes_nothing(keys, queries):
    index = IVFIndex(keys)
    expected = search._list_search(index, queries, 5)
    for budget in (1, 20_000):
        similarity, rows = search._list_search(index, queries, 5, budget=budget)
        assert similarity.allclose(expected[0], atol=1e-5) and (rows == expected[1]).float().mean() > 0.99


def test_memory_is_bounded(keys, queries, monkeypatch):
    "No product is larger than its block, and a list search never holds more similarities than its budget."
    sizes = []
    block_top_k = search._block_top_k
    monkeypatch.setattr(search, "_block_top_k", lambda s, k: sizes.append(s.shape) or block_top_k(s, k))
    top_k(queries, keys, 3, query_block=50, key_block=1000)
    assert max(rows for rows, _ in sizes) <= 50 and max(columns for _, columns in sizes) <= 1000
    flat, products = [], search._list_products
    monkeypatch.setattr(search, "_list_products", lambda *a: flat.append(a[4]) or products(*a))
    search._list_search(IVFIndex(keys), queries, 5, budget=30_000)
    assert len(flat) > 5 and max(flat) <= 30_000


def test_centres_are_directions_and_repeatable(keys):
    centres = cluster(keys, 40, seed=3)
    assert centres.equal(cluster(keys, 40, seed=3)) and not centres.equal(cluster(keys, 40, seed=4))
    assert torch.allclose(centres.norm(dim=1), torch.ones(40))
    start = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(3))[:40]]
    assert top_k(keys, centres, 1)[0].mean() > top_k(keys, start, 1)[0].mean() + 0.02


def test_centres_of_fewer_keys_than_lists():
    index = IVFIndex(unit(3), lists=50)
    assert len(index.centres) == 3 and index.search(unit(3), 1)[1].flatten().tolist() == [0, 1, 2]


# --- adding, removing, saving ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_are_those_of_the_bank(make, dtype, keys):
    "After adding and removing, row i is tensor[i] of a tensor that was treated alike."
    index, mirror = make(keys[:1000], dtype=dtype), keys[:1000]
    for step in range(3):
        gone = torch.randperm(len(mirror), generator=torch.Generator().manual_seed(step))[:200]
        keep = torch.ones(len(mirror), dtype=torch.bool).index_fill(0, gone, False)
        more = keys[1000 + 300 * step:1300 + 300 * step]
        index.remove(gone)
        index.add(more)
        mirror = torch.cat([mirror[keep], more])
        assert len(index) == len(mirror)
        assert (index.keys() * mirror).sum(1).min() > 0.999
        assert (index.keys(torch.tensor([5, len(mirror) - 1])) * mirror[[5, -1]]).sum(1).min() > 0.999
        assert (index.search(mirror, 1)[1].flatten() == torch.arange(len(mirror))).float().mean() > 0.995


@both
@pytest.mark.parametrize("rows", [[-1], [0, 60], [10**6]])
def test_rows_that_are_not_there(make, rows, keys):
    index = make(keys[:60])
    with pytest.raises(AoiError, match="rows 0 to 59"):
        index.remove(torch.tensor(rows))
    assert len(index) == 60
    index.remove(torch.tensor([], dtype=torch.int64))
    assert len(index) == 60


def test_a_bank_that_has_grown_gets_new_centres(keys, queries):
    index = IVFIndex(keys[:1000], dtype="float16", reach=1.7)
    index.add(keys[1000:3000])
    assert len(index.centres) == search.list_count(1000)
    index.add(keys[3000:])
    assert len(index.centres) == search.list_count(6000) and index.dtype == "float16"
    assert float(index.reach) == pytest.approx(1.7)
    assert recall(queries, keys, index.search(queries, 5)[1], 5) > 0.9


@both
def test_saved_as_tensors_alone(make, keys, queries):
    index = make(keys, dtype="int8")
    index.add(keys[:10])
    again = load_index(load(save({name: tensor.contiguous() for name, tensor in index.state().items()})))
    assert type(again) is type(index) and again.nbytes == index.nbytes
    assert all(a.equal(b) for a, b in zip(again.search(queries, 5), index.search(queries, 5), strict=True))
    again.add(keys[:10])
    again.remove(torch.tensor([0]))
    assert len(again) == len(index) + 9


def test_the_kind_follows_the_size(keys, monkeypatch):
    assert isinstance(build_index(keys), ExactIndex) and build_index(keys).dtype == "float32"
    monkeypatch.setattr(search, "MOST_EXACT", 5999)
    assert isinstance(build_index(keys), IVFIndex) and build_index(keys).dtype == "float16"
    assert build_index(keys, dtype="int8").dtype == "int8"
    assert isinstance(build_index(keys, kind="exact"), ExactIndex)
    with pytest.raises(AoiError, match="'annoy'"):
        build_index(keys, kind="annoy")


# --- lists by faiss -------------------------------------------------------------------------------------------------


needs_faiss = pytest.mark.skipif(search._faiss() is None, reason="faiss is not installed, or not used on this system")


@pytest.fixture
def without(monkeypatch):
    "Call something as if faiss were not installed."

    def call(ask, *arguments):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "faiss", None)
            assert search._faiss() is None
            return ask(*arguments)

    return call


def agree(found, expected) -> bool:
    "The same neighbours; two that are equally near to within rounding may change places."
    return found[0].allclose(expected[0], atol=1e-5) and (found[1] == expected[1]).float().mean().item() > 0.998


def test_nothing_but_torch_is_needed(keys, queries, without):
    index = IVFIndex(keys)
    assert recall(queries, keys, without(index.search, queries, 5)[1], 5) > 0.9
    assert index._by_faiss is None and "sklearn" not in sys.modules


@needs_faiss
@pytest.mark.parametrize("options", [{"lists": 40}, {"lists": 300, "reach": 1.0}, {"lists": 16, "reach": 100}, {"lists": 1}])
def test_faiss_finds_what_torch_finds(options, keys, queries, without, monkeypatch):
    "Few neighbours, more than some lists hold, more than all that are looked into hold; also after adding and removing."
    index, torch_scan = IVFIndex(keys[:5000], **options), search._list_search
    for change in (lambda: None, lambda: index.add(keys[5000:]), lambda: index.remove(torch.arange(0, 6000, 7))):
        change()
        for k in (1, 5, 400):
            expected = without(index.search, queries[:100], k)
            with monkeypatch.context() as patch:
                patch.setattr(search, "_list_search", None)  # nobody asks torch
                found = index.search(queries[:100], k)
            assert agree(found, expected) and (found[0].diff(dim=1) <= 0).all() and found[1].dtype == torch.int64
    assert search._list_search is torch_scan and (index.search(queries, 3000)[1] >= 0).all()


@needs_faiss
def test_lists_without_keys_and_fewer_keys_than_neighbours(keys, without):
    index = IVFIndex(keys[:60], lists=40)
    index.remove(torch.arange(40))
    assert (index.bounds.diff() == 0).any()
    found = index.search(keys[:9], 100)
    assert found[1].shape == (9, 20) and (found[1].sort(1).values == torch.arange(20)).all()
    assert agree(found, without(index.search, keys[:9], 100))


@needs_faiss
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_faiss_has_the_threads_of_torch(threads, keys, without):
    "Also with fewer queries than threads."
    import faiss

    index, before = IVFIndex(keys), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for count in (1, 2, 300):
            queries = keys[-count:]
            assert agree(index.search(queries, 5), without(index.search, queries, 5))
            assert faiss.omp_get_max_threads() == threads
    finally:
        torch.set_num_threads(before)


@needs_faiss
def test_what_faiss_holds_is_forgotten(keys, queries):
    "When keys come, go or move; and a copy has none of it, on disk or in memory."
    index = IVFIndex(keys)
    index.search(queries, 1)
    kept = index._by_faiss
    index.search(queries, 5)
    assert index._by_faiss is kept is not None
    for other in (copy.copy(index), copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert other._by_faiss is None and other.search(queries, 5)[1].equal(index.search(queries, 5)[1])
    assert index._by_faiss is kept and index.state().keys() == IVFIndex(keys).state().keys() == index.state_dict().keys()
    for change in (lambda: index.add(keys[:5]), lambda: index.add(keys.repeat(4, 1)), lambda: index.remove(torch.arange(5)), index.cpu):
        index.search(queries, 1)
        assert index._by_faiss is not None
        change()
        assert index._by_faiss is None


@needs_faiss
def test_saved_with_faiss_and_opened_without_it(keys, queries, without):
    def reopened(index):
        return load_index(load(save({name: tensor.contiguous() for name, tensor in index.state().items()})))

    index = IVFIndex(keys)
    expected = index.search(queries, 5)
    assert agree(without(lambda: reopened(index).search(queries, 5)), expected)
    assert agree(reopened(without(lambda: reopened(index))).search(queries, 5), expected)


@needs_faiss
def test_what_torch_scans_although_faiss_is_there(keys, queries, monkeypatch):
    folds, own = torch.arange(len(keys)) % 3, torch.arange(len(queries)) % 3
    index = IVFIndex(keys)
    index.search(queries, 5, apart=(folds, own))
    others = [IVFIndex(keys, dtype=dtype) for dtype in ("int8", "float32")]
    assert index._by_faiss is None and all(other.search(queries, 5) and other._by_faiss is None for other in others)
    monkeypatch.setattr(search, "FAISS", False)
    index.search(queries, 5)
    assert index._by_faiss is None


@needs_faiss
def test_bytes_are_told_before_and_after(keys, queries, without, monkeypatch):
    "What faiss is estimated to hold is what it holds, but for some numbers for each list."
    import faiss

    monkeypatch.setattr(search, "MOST_EXACT", 5999)
    index = IVFIndex(keys)
    without_it = index.nbytes
    assert without_it - index.codes.nbytes == without(index_bytes, 6000, 32)
    index.search(queries, 5)
    assert index.nbytes - index.codes.nbytes == index_bytes(6000, 32) == without(index_bytes, 6000, 32) + 6000 * faiss_bytes(32)
    held = faiss.serialize_index(index._by_faiss).nbytes
    assert 0 <= held - (index.nbytes - without_it) < 16 * len(index.centres) + 1024
    assert index_bytes(5999, 32) == 0


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_are_kept_once():
    g = torch.Generator().manual_seed(0)
    few = pack_bits(torch.rand(7, 64, generator=g) > 0.5)
    few[0] = 0
    values, known = few[torch.randint(0, 7, (500,), generator=g)], torch.full((500, 8), 255, dtype=torch.uint8)
    known[::50] = 15
    (number, distinct), (_, there) = distinct_masks(values), distinct_masks(known)
    assert number.dtype == torch.int32 and len(distinct) == 7 and len(there) == 2
    assert distinct[number].equal(values)
    weights, index = torch.rand(20, 5, generator=g), torch.randint(0, 500, (20, 5), generator=g)
    expected = aggregate(weights, index, values, count=64)
    assert aggregate(weights, number[index], distinct, count=64).allclose(expected)


def test_rows_of_masks_are_like_the_tensor():
    g = torch.Generator().manual_seed(0)
    packed = (torch.rand(9, 6, generator=g) * 256).byte()[torch.randint(0, 9, (60,), generator=g)]
    once, more = MaskRows(*distinct_masks(packed)), MaskRows(*distinct_masks(packed[:5]))
    kept = once.join(more).keep(torch.tensor([64, 3, 3, 0]))
    assert len(once) == 60 and kept[torch.arange(4)].equal(packed[[4, 3, 3, 0]])
    assert len(kept.table) == 3 and kept.nbytes == 4 * 4 + 3 * 6
    weights, index = torch.rand(4, 3, generator=g), torch.randint(0, 60, (4, 3), generator=g)
    assert aggregate(weights, index, once, once, count=48).equal(aggregate(weights, index, packed, packed, count=48))
    assert len(MaskRows(*distinct_masks(packed[:0]))) == 0


def test_votes_of_patches_at_a_border_are_counted_pixel_by_pixel():
    "Block by block, whether a block holds a patch that is not known everywhere or not; against plain sums."
    g = torch.Generator().manual_seed(0)
    known = torch.ones(60, 40, dtype=torch.bool)
    known[7, :11] = known[41, 30:] = False
    values = (torch.rand(60, 40, generator=g) > 0.6) & known
    weights, index = torch.rand(33, 5, generator=g), torch.randint(0, 60, (33, 5), generator=g)
    index[3, 4], index[:8] = -1, index[:8].clamp(max=6)  # the first block knows everything
    mine = weights.masked_fill(index < 0, 0)[..., None]
    votes, total = cast_votes(weights, index, pack_bits(values), pack_bits(known), count=40, block=8)
    assert votes.allclose((mine * values[index]).sum(1), atol=1e-6)
    assert total.allclose((mine * known[index]).sum(1), atol=1e-6)
    assert cast_votes(weights, index, pack_bits(values), count=40)[1].shape == (33, 1)


def test_classes_of_a_packed_mask():
    "Also where a class does not end with a byte."
    masks = torch.zeros(4, 3, 5, 5, dtype=torch.bool)
    masks[1, 0, 4, 4] = masks[2, 1, 0, 0] = masks[2, 2, 4, 4] = True
    got = shown_classes(pack_bits(masks.flatten(1)), 3, 75, block=3)
    assert got.tolist() == [[False] * 3, [True, False, False], [False, True, True], [False] * 3]


# --- fewer keys -----------------------------------------------------------------------------------------------------


def test_farthest_first_by_hand():
    angles = np.deg2rad([0, 90, 30, 0])
    keys = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1)).float()
    cosine = np.cos(np.deg2rad(30))
    assert insertion_distances(keys).tolist() == pytest.approx([2, 1, 1 - cosine, 0], abs=1e-6)
    assert coreset(keys, 2).tolist() == [0, 1] and coreset(keys, 3).tolist() == [0, 1, 2]
    assert coreset(keys, 4).tolist() == coreset(keys, 9).tolist() == [0, 1, 2, 3]


def farthest(keys, rows):
    return 1 - (keys @ keys[rows].T).amax(1).min().item()


@pytest.mark.parametrize("block", [100, 1024, 3000])
def test_a_coreset_covers_better_than_chance(block, keys):
    chance = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    reach = [farthest(keys, coreset(keys, n, block=block)) for n in (200, 800, 3000)]
    assert reach[0] > reach[1] > reach[2]
    assert all(r < farthest(keys, chance[:n]) for r, n in zip(reach[1:], (800, 3000), strict=True))
    rows = coreset(keys, 200, block=block)
    assert len(set(rows.tolist())) == 200 and (rows.diff() > 0).all() and rows.equal(coreset(keys, 200, block=block))


def test_doubles_go_first(keys):
    doubled = torch.cat([keys[:500], keys[:500]])
    assert sorted((coreset(doubled, 500, block=10**6) % 500).tolist()) == list(range(500))


def test_rare_classes_stay(keys):
    classes = torch.zeros(len(keys), 3, dtype=torch.bool)
    classes[::2, 0], classes[::500, 1] = True, True  # half of all patches; one in 500; the third: nowhere
    rows = coreset(keys, 600, classes=classes)
    assert set(range(0, len(keys), 500)) <= set(rows.tolist())
    kept = classes[rows].sum(0).tolist()
    assert kept == [12 + 294, 12, 0] and len(rows) == 600  # the rest is shared by the common class and the background
    assert classes[coreset(keys, 600)].sum(0)[1] < 12
