import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from phyxdream.envs.spaces import ActionMap, ObservationMap
from phyxdream.errors import EnvError


def shapes(space, **kwargs):
    return {k: (v.shape, v.dtype.name) for k, v in ObservationMap(space, **kwargs).space.items()}


def byte_box(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (byte_box(64, 48, 3), {"image": ((3, 64, 48), "uint8")}),
        (byte_box(3, 64, 48), {"image": ((3, 64, 48), "uint8")}),
        (byte_box(9, 9, 17), {"image": ((17, 9, 9), "uint8")}),
        (byte_box(12, 64, 64), {"image": ((12, 64, 64), "uint8")}),
        (byte_box(20, 30), {"image": ((1, 20, 30), "uint8")}),
        (byte_box(4, 30), {"state": ((120,), "float32")}),
        (byte_box(128), {"state": ((128,), "float32")}),
        (spaces.Box(0, 1, (10, 5), np.float32), {"image": ((1, 10, 5), "uint8")}),
        (spaces.Box(-1, 1, (10, 5), np.float32), {"state": ((50,), "float32")}),
        (spaces.Box(-1, 1, (), np.float64), {"state": ((1,), "float32")}),
        (spaces.Discrete(5, start=-2), {"state": ((5,), "float32")}),
        (spaces.MultiDiscrete([2, 3]), {"state": ((5,), "float32")}),
        (spaces.MultiBinary([2, 3]), {"state": ((6,), "float32")}),
        (
            spaces.Dict(arm=spaces.Dict({"joint pos": spaces.Box(-1, 1, (2,)), "v": spaces.Box(-1, 1, ())})),
            {"arm_joint_pos": ((2,), "float32"), "arm_v": ((1,), "float32")},
        ),
        (
            spaces.Dict(pixels=byte_box(8, 8, 3), reward=spaces.Box(0, 1, ())),
            {"image": ((3, 8, 8), "uint8"), "obs_reward": ((1,), "float32")},
        ),
        (
            spaces.Dict(left=byte_box(8, 8, 3), right=byte_box(8, 8, 3)),
            {"left": ((3, 8, 8), "uint8"), "right": ((3, 8, 8), "uint8")},
        ),
    ],
)
def test_spaces_become_pictures_and_vectors(space, expected):
    assert shapes(space) == expected
    batch = gymnasium.vector.utils.batch_space(space, 3)
    for key, value in ObservationMap(space)(batch.sample()).items():
        assert value.shape == (3, *expected[key][0]) and value.dtype == expected[key][1]
        assert value.flags.owndata and value.flags.c_contiguous


@pytest.mark.parametrize(
    "space",
    [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.Tuple([spaces.Discrete(2)]), spaces.Dict()],
    ids=lambda s: type(s).__name__,
)
def test_foreign_observation_space_is_named(space):
    with pytest.raises(EnvError, match=type(space).__name__):
        ObservationMap(space)


def test_foreign_entry_is_named_by_its_path():
    with pytest.raises(EnvError, match=r"robot\.mission has the space Text"):
        ObservationMap(spaces.Dict(robot=spaces.Dict(mission=spaces.Text(5))))


def test_entries_that_flatten_to_one_name_are_refused():
    box = spaces.Box(-1, 1, (2,))
    with pytest.raises(EnvError, match="'a_b'"):
        ObservationMap(spaces.Dict({"a_b": box, "a": spaces.Dict(b=box)}))


def test_values():
    picture = ObservationMap(spaces.Box(0, 1, (5, 6), np.float32))(np.full((2, 5, 6), 0.5))["image"]
    assert (picture == 128).all()
    hwc = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    np.testing.assert_array_equal(ObservationMap(byte_box(5, 6, 3))(hwc)["image"], hwc.transpose(0, 3, 1, 2))
    one_hot = ObservationMap(spaces.Discrete(3, start=-1))(np.array([-1, 1, 0]))["state"]
    np.testing.assert_array_equal(one_hot, np.eye(3)[[0, 2, 1]])
    two_hot = ObservationMap(spaces.MultiDiscrete([2, 3]))(np.array([[1, 0], [0, 2]]))["state"]
    np.testing.assert_array_equal(two_hot, [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])


def test_resizing_averages_areas_and_repeats_pixels():
    batch = np.random.default_rng(0).integers(0, 256, (2, 3, 12, 20), np.uint8)
    small = ObservationMap(byte_box(3, 12, 20), (6, 5))(batch)["image"]
    mean = batch.reshape(2, 3, 6, 2, 5, 4).mean((3, 5))
    assert np.abs(small - mean).max() <= 1.0
    large = ObservationMap(byte_box(3, 12, 20), (24, 40))(batch)["image"]
    np.testing.assert_array_equal(large, batch.repeat(2, axis=2).repeat(2, axis=3))


@given(
    low=st.floats(-50, 50), width=st.floats(0.01, 50), unit=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2)
)
@settings(max_examples=50, deadline=None)
def test_boxes_of_actions_are_rescaled_and_clipped(low, width, unit):
    inner = spaces.Box(low, low + width, (2,), np.float64)
    action = ActionMap(inner)
    assert action.space == spaces.Box(-1, 1, (2,), np.float32)
    got = action(np.array([unit], np.float32), 1)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got[0], low + width * (np.clip(unit, -1, 1) + 1) / 2, rtol=1e-6, atol=1e-6)
    assert inner.contains(got[0])


def test_actions_keep_the_shape_and_start_of_the_backend():
    assert ActionMap(spaces.Box(-2, 2, (2, 3)))(np.zeros((4, 6)), 4).shape == (4, 2, 3)
    np.testing.assert_array_equal(ActionMap(spaces.Discrete(3, start=5))(np.array([0, 2]), 2), [5, 7])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-np.inf, np.inf, (2,)), "infinite bounds"),
        (spaces.Box(0, 5, (2,), np.int32), "Box of floats"),
        (spaces.MultiDiscrete([2, 2]), "MultiDiscrete"),
        (spaces.Tuple([spaces.Discrete(2)]), "Tuple"),
    ],
)
def test_foreign_action_space_is_named(space, message):
    with pytest.raises(EnvError, match=message):
        ActionMap(space)


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (spaces.Discrete(3), np.zeros(3, int), r"shape \(3,\).*expected shape \(2,\) and integers"),
        (spaces.Discrete(3), np.zeros(2), r"dtype float64; expected shape \(2,\) and integers"),
        (spaces.Discrete(3), np.array([0, 3]), "env 1 is 3; expected 0 to 2"),
        (spaces.Discrete(3), np.array([-1, 0]), "env 0 is -1"),
        (spaces.Box(-1, 1, (4,)), np.zeros((2, 3), np.float32), r"expected shape \(2, 4\) and floats"),
        (spaces.Box(-1, 1, (1,)), np.zeros((2, 1), int), "floats"),
        (spaces.Box(-1, 1, (1,)), np.array([[0.0], [np.nan]]), r"env 1 is \[nan\]"),
    ],
)
def test_wrong_actions_are_refused(space, actions, message):
    with pytest.raises(EnvError, match=message):
        ActionMap(space)(actions, 2)
