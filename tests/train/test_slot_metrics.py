import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from phyxdream.envs.sprites import SpriteScenes
from phyxdream.train import slot_metrics as m


def soft(labels, slots=None):
    """Masks (..., K, H, W) that win exactly where the labels say, without being one-hot."""
    labels = np.asarray(labels)
    onehot = np.eye(slots or labels.max() + 1)[labels]
    return np.moveaxis(onehot * 0.5 + 0.3, -1, -3)


def rand_index_by_pairs(truth, labels):
    """Hubert and Arabie's definition, pair by pair."""
    pairs = list(itertools.combinations(range(len(truth)), 2))
    both = sum(truth[i] == truth[j] and labels[i] == labels[j] for i, j in pairs)
    a = sum(truth[i] == truth[j] for i, j in pairs)
    b = sum(labels[i] == labels[j] for i, j in pairs)
    expected = a * b / max(len(pairs), 1)
    return 1.0 if (a + b) / 2 == expected else (both - expected) / ((a + b) / 2 - expected)


two_labels = st.integers(2, 14).flatmap(
    lambda n: st.tuples(*[hnp.arrays(np.int64, (1, n), elements=st.integers(0, 3))] * 2)
)


@given(two_labels)
def test_ari_is_its_definition(pair):
    truth, labels = pair
    assert m.adjusted_rand_index(truth, soft(labels, 4)) == pytest.approx(rand_index_by_pairs(truth[0], labels[0]))
    inside = truth[0] > 0
    score = m.foreground_ari(truth, soft(labels, 4))
    if inside.any():
        assert score == pytest.approx(rand_index_by_pairs(truth[0][inside], labels[0][inside]))
    else:
        assert np.isnan(score)


@pytest.mark.parametrize(
    ("truth", "labels", "expected"),
    [  # the examples of scikit-learn's adjusted_rand_score
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 2], [0, 0, 1, 1], 0.5714285714),
        ([0, 0, 1, 1], [0, 0, 1, 2], 0.5714285714),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
    ],
)
def test_ari_of_known_examples(truth, labels, expected):
    assert m.adjusted_rand_index([truth], soft([labels], 4)) == pytest.approx(expected)


@settings(deadline=None)
@given(two_labels, st.permutations(range(4)))
def test_the_order_of_slots_and_objects_is_nothing(pair, order):
    truth, labels = pair
    masks = soft(labels, 4)
    renamed = np.concatenate([[0], np.array([o for o in order if o])])[truth]  # the background keeps its number
    for score in (m.adjusted_rand_index, m.foreground_ari, m.mask_iou, m.mean_best_overlap, m.over_segmentation):
        np.testing.assert_allclose(score(renamed, masks[list(order)]), score(truth, masks), atol=1e-12)


@settings(deadline=None)
@given(two_labels)
def test_bounds_and_the_perfect_score(pair):
    truth, labels = pair
    masks = soft(labels, 4)
    best, iou = m.mean_best_overlap(truth, masks), m.mask_iou(truth, masks)
    if (truth > 0).any():
        assert 0 <= iou <= best + 1e-12 <= 1 + 1e-12
    perfect = soft(truth, 4)
    for score in (m.foreground_ari, m.mask_iou, m.mean_best_overlap):
        assert np.isnan(score(truth, perfect)) if not (truth > 0).any() else score(truth, perfect) == pytest.approx(1)
    assert not (m.over_segmentation(truth, perfect) > 0)
    np.testing.assert_allclose(m.slot_usage(masks).sum(-1), 1)


@settings(deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0])))
))  # fmt: skip
def test_assignment_is_the_cheapest_of_all(cost):
    rows, columns = m.assignment(cost)
    R, C = cost.shape
    assert len(set(rows)) == len(set(columns)) == len(rows) == min(R, C) and (np.diff(rows) > 0).all()
    table = cost if R <= C else cost.T
    cheapest = min(
        sum(table[i, c] for i, c in enumerate(p)) for p in itertools.permutations(range(max(R, C)), min(R, C))
    )
    assert cost[rows, columns].sum() == pytest.approx(cheapest, abs=1e-9)


def test_iou_by_hand():
    truth = [[1, 1, 1, 1], [2, 2, 0, 0]]
    labels = [[0, 0, 0, 1], [0, 1, 1, 1]]
    # Object 1 with slots 0, 1: 3/5, 1/7; object 2: 1/5, 1/5.
    np.testing.assert_allclose(m.overlaps(truth, soft(labels)), [[3 / 5, 1 / 7], [1 / 5, 1 / 5]])
    assert m.mask_iou(truth, soft(labels)) == pytest.approx((3 / 5 + 1 / 5) / 2)
    assert m.mean_best_overlap(truth, soft(labels)) == pytest.approx((3 / 5 + 1 / 5) / 2)
    one = soft(np.zeros((2, 4), int), 1)  # a single slot: object 2 gets none, but may share it
    assert m.mask_iou(truth, one) == pytest.approx(4 / 8 / 2)
    assert m.mean_best_overlap(truth, one) == pytest.approx((4 / 8 + 2 / 8) / 2)


def test_the_matching_is_for_the_best_sum():
    truth = [[1] * 10 + [2] * 10]
    labels = [[0] * 6 + [1] * 4 + [0] * 9 + [2]]
    # Both objects overlap slot 0 most; object 2 needs it more.
    expected = (4 / 10 + 9 / 16) / 2
    assert m.mask_iou(truth, soft(labels)) == pytest.approx(expected)
    assert m.mean_best_overlap(truth, soft(labels)) == pytest.approx((max(6 / 19, 4 / 10) + 9 / 16) / 2)


def test_an_object_that_is_hidden_scores_nothing():
    truth = np.array([[[1, 1, 3, 3]], [[0, 0, 0, 0]]])  # no object 2 anywhere, none at all in the second frame
    masks = soft([[[0, 0, 1, 1]], [[0, 1, 0, 1]]])
    for score in (m.mask_iou, m.mean_best_overlap, m.foreground_ari):
        np.testing.assert_array_equal(score(truth, masks), [1, np.nan])


def test_usage_and_collapse():
    masks = soft([[[0] * 7 + [2] * 3], [[1] * 10]], 3)
    np.testing.assert_allclose(m.slot_usage(masks), [[0.7, 0, 0.3], [0, 1, 0]])
    assert m.used_slots(masks).tolist() == [2, 1] and m.used_slots(masks, 0.5).tolist() == [1, 1]
    assert m.collapsed(masks).tolist() == [False, True] and m.collapsed(masks, 0.5).tolist() == [True, True]


def test_over_segmentation_by_hand():
    truth = [[1] * 10 + [2] * 10 + [0] * 4]
    labels = [[0] * 9 + [1] + [2] * 10 + [0, 1, 2, 3]]
    assert m.over_segmentation(truth, soft(labels)) == 0.5  # a tenth of object 1 counts
    assert m.over_segmentation(truth, soft(labels), part=0.2) == 0
    assert np.isnan(m.over_segmentation([[0, 0]], soft([[0, 1]])))


def test_identity_switches_by_hand():
    truth = np.array([[[1, 1, 2, 2]]] * 4)  # (T, H, W)
    labels = [[[0, 0, 1, 1]], [[0, 0, 1, 1]], [[1, 1, 0, 0]], [[1, 1, 1, 0]]]
    # Both switch at the third frame; a tie goes to the lower slot, so object 2 stays at the fourth: 2 of 6 steps.
    assert m.identity_switches(truth, soft(labels)) == pytest.approx(2 / 6)
    truth[2, 0, 2:] = 0  # object 2 is hidden at the third frame: only object 1's three steps and one of 2 count
    assert m.identity_switches(truth, soft(labels)) == pytest.approx(1 / 4)
    assert np.isnan(m.identity_switches(truth[:1], soft(labels)[:1]))
    assert np.isnan(m.identity_switches(truth, soft(labels), least=3))


def test_true_masks_of_scenes_score_one_and_shuffled_slots_switch():
    truth = SpriteScenes(3, 6, size=24, sprites=(2, 3), seed=0).batch(0)["mask"]
    scores = m.summary(soft(truth, 5), truth)
    assert list(scores) == [
        "FG-ARI", "ARI", "mask IoU", "mean best overlap", "objects split", "identity switches", "slots used",
        "collapsed",
    ]  # fmt: skip
    assert [scores[k] for k in list(scores)[:4]] == pytest.approx([1] * 4)
    assert scores["objects split"] == scores["identity switches"] == scores["collapsed"] == 0
    assert 2.5 < scores["slots used"] <= 4
    shuffled = soft(truth, 5)
    shuffled[1::2] = np.roll(shuffled[1::2], 1, axis=2)
    turned = m.summary(torch.from_numpy(shuffled).bfloat16(), torch.from_numpy(truth))
    assert turned["FG-ARI"] == pytest.approx(1) and turned["identity switches"] == 1
    assert m.summary(shuffled).keys() == {"slots used", "collapsed"}


def test_random_slots_score_about_nothing():
    truth = SpriteScenes(8, size=32, seed=1).batch(0)["mask"]
    masks = np.random.default_rng(0).random((8, 5, 32, 32))
    assert abs(m.foreground_ari(truth, masks).mean()) < 0.02 and abs(m.adjusted_rand_index(truth, masks).mean()) < 0.02
    assert m.mask_iou(truth, masks).mean() < 0.2 and m.over_segmentation(truth, masks).mean() > 0.9


@pytest.mark.parametrize(
    ("truth", "masks", "message"),
    [
        (np.zeros((2, 4, 4)), np.zeros((2, 3, 4, 4)), "truth: expected integers of at least 0, got float64"),
        (np.full((2, 4, 4), -1), np.zeros((2, 3, 4, 4)), "truth: expected integers of at least 0, got int64 from -1"),
        (np.zeros((2, 4, 5), int), np.zeros((2, 3, 4, 4)), r"truth: expected \(\.\.\., H, W\) = \(2, 4, 4\)"),
        (np.zeros((4, 4), int), np.zeros((4, 4)), r"masks: expected \(\.\.\., K, H, W\), got \(4, 4\)"),
        (np.zeros((4, 4), int), np.zeros((0, 4, 4)), "masks: expected"),
    ],
)
def test_what_does_not_fit_is_named(truth, masks, message):
    with pytest.raises(ValueError, match=message):
        m.foreground_ari(truth, masks)
