import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phyxdream import envs
from phyxdream.envs.sprites import SHAPES, Sprites, SpriteScenes, SpritesEnv, bounce, draw


def one_frame(shape, center, radius=0.2, angle=0.0, order=None):
    """Sprites of one frame: pure red, green and blue, in this order."""
    count = len(center)
    return Sprites(
        shape=np.full((1, count), SHAPES.index(shape)),
        center=np.array(center, float)[None],
        radius=np.full((1, count), radius),
        angle=np.full((1, count), angle),
        colour=np.eye(3)[None, :count],
        order=np.array([range(count) if order is None else order]),
    )


@pytest.mark.parametrize(
    ("shape", "area"), [("square", 1.4**2), ("triangle", 0.55**2 * 3**1.5), ("disc", np.pi * 0.8**2), ("cross", 2.03)]
)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_shapes_have_their_area_and_centre(shape, area, angle):
    image, mask = draw(one_frame(shape, [(0.45, 0.55)], 0.25, angle), np.zeros((1, 3)), 128)
    red = image[0, 0] / 255.0
    assert red.sum() / 128**2 == pytest.approx(area * 0.25**2, rel=0.02)
    assert (mask == 1).sum() / 128**2 == pytest.approx(area * 0.25**2, rel=0.02)
    at = (np.arange(128) + 0.5) / 128
    np.testing.assert_allclose([(red.sum(0) * at).sum(), (red.sum(1) * at).sum()] / red.sum(), [0.45, 0.55], atol=2e-3)
    assert not image[0, 1:].any()


def test_the_front_sprite_hides_those_behind():
    center = [(0.4, 0.5), (0.6, 0.5)]
    for order, front in (([0, 1], 1), ([1, 0], 0)):
        image, mask = draw(one_frame("square", center, order=order), np.full((1, 3), 0.5), 50)
        assert mask[0, 25, 25] == front + 1 and (image[0, :, 25, 25] == 255 * np.eye(3)[front]).all()
        assert set(np.unique(mask)) == {0, 1, 2} and (image[0, :, 0, 0] == 128).all()
        # What is behind loses exactly the pixels of what is before it.
        alone = draw(one_frame("square", center[front : front + 1]), np.zeros((1, 3)), 50)[1]
        assert ((mask == front + 1) == (alone == 1)).all()


def test_a_sprite_may_leave_the_picture_or_be_absent():
    center = [(0.0, 0.0), (1.0, 1.0), (5.0, -3.0)]
    _, mask = draw(one_frame("square", center), np.zeros((1, 3)), 40)
    assert (mask == 1).sum() == (mask == 2).sum() == round(0.14 * 40) ** 2 and not (mask == 3).any()
    image, mask = draw(one_frame("disc", [(0.5, 0.5)], 0.0), np.full((1, 3), 0.2), 16)
    assert not mask.any() and (image == 51).all()


@given(st.floats(-20, 20), st.floats(0, 0.4), st.floats(0, 0.09))
def test_bouncing_stays_inside_and_keeps_the_speed(position, low, step):
    high = 1 - low
    here, there = bounce(np.array([position, position + step]), low, high)
    assert low - 1e-9 <= here <= high + 1e-9 and abs(there - here) <= step + 1e-9
    inside = low + (high - low) * 0.3
    assert bounce(np.array(inside), low, high) == pytest.approx(inside)
    assert bounce(np.array(high + 0.01), low, high) == pytest.approx(high - 0.01)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([None, 1, 4]), st.sampled_from([5, 24]), st.integers(1, 3), st.booleans(),
    st.integers(0, 2**40),
)  # fmt: skip
def test_batches(batch_size, length, size, fewest, texture, seed):
    def make(seed):
        return SpriteScenes(batch_size, length, size=size, sprites=(fewest, 3), texture=texture, seed=seed)

    batch = make(seed).batch(3)
    lead = (batch_size,) if length is None else (length, batch_size)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((*lead, 3, size, size), "uint8"),
        "mask": ((*lead, size, size), "uint8"),
    }
    assert batch["mask"].max() <= 3
    again = make(seed)
    again.batch(0)
    for key, value in again.batch(3).items():
        np.testing.assert_array_equal(value, batch[key])
    assert not np.array_equal(make(seed + 1).batch(3)["image"], batch["image"])
    assert not np.array_equal(make(seed).batch(4)["image"], batch["image"])


def test_scenes_hold_as_many_sprites_as_asked_for():
    mask = SpriteScenes(200, size=32, sprites=(2, 4), seed=1).batch(0)["mask"]
    counts = np.array([len(np.unique(m)) - 1 for m in mask])
    assert (np.bincount(counts, minlength=5)[2:] > 30).all() and counts.max() == 4
    full = SpriteScenes(50, size=32, sprites=(3, 3), seed=1).batch(0)["mask"]
    assert np.mean([len(np.unique(m)) == 4 for m in full]) > 0.95  # hardly any starts hidden


def test_sprites_move_and_keep_their_number():
    batch = SpriteScenes(8, 12, size=48, sprites=(1, 1), speed=(0.03, 0.03), seed=2).batch(0)
    at = (np.arange(48) + 0.5) / 48
    inside = batch["mask"] == 1
    centers = np.stack([(inside.sum(axis) * at).sum(-1) / inside.sum((-2, -1)) for axis in (-2, -1)], -1)
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=-1)
    assert np.median(steps) == pytest.approx(0.03, abs=0.004) and steps.max() < 0.05
    colour = [batch["image"][t, 0][:, inside[t, 0]] for t in range(12)]
    medians = np.array([np.median(c, axis=1) for c in colour])
    assert (medians == medians[0]).all()


def test_the_iterator_goes_through_the_batches():
    scenes = SpriteScenes(2, size=8)
    for index, batch in zip(range(3), scenes, strict=False):
        np.testing.assert_array_equal(batch["image"], scenes.batch(index)["image"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": None}, "batch_size"),
        ({"length": 0}, "length"),
        ({"size": 2.0}, "size"),
        ({"sprites": (3, 2)}, "sprites"),
        ({"sprites": (1, 255)}, "sprites"),
        ({"shapes": ("disc", "hexagon")}, "shapes: expected names from .*hexagon"),
        ({"shapes": ()}, "shapes"),
        ({"radius": (0.2, 0.5)}, "radius"),
        ({"speed": (-1, 0)}, "speed"),
        ({"seed": -1}, "seed"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpriteScenes(**{"batch_size": 1, **arguments})


# The environment


def scripted(mask, continuous):
    """A near-perfect policy from the mask alone: towards the square's centre, along the longer axis first."""
    at = (np.arange(mask.shape[-1]) + 0.5) / mask.shape[-1]
    goal, disc = (
        np.array([at[np.flatnonzero((mask == number).any(axis))[[0, -1]]].mean() for axis in (0, 1)])
        for number in (1, 2)
    )
    way = goal - disc
    if continuous:
        return (way / SpritesEnv.STEP).clip(-1, 1).astype(np.float32)
    axis = np.abs(way).argmax()
    return 0 if abs(way[axis]) < SpritesEnv.STEP / 2 else 1 + 2 * axis + (way[axis] > 0)


def returns(id, policy, episodes=24, **options):
    env = envs.make(f"gym:phyxdream/{id}", num_envs=8, seed=5, segmentation=True, **options)
    env.action_space.seed(0)
    _, info = env.reset()
    total, finished, length = np.zeros(8), [], 0
    while len(finished) < episodes:
        _, reward, terminated, truncated, info = env.step(policy(env, info["segmentation"]))
        total, length = total + reward, length + 1
        assert not terminated.any() and (truncated == (length % 51 == 50)).all()
        if truncated.all():
            finished += total.tolist()
            total[:] = 0
    env.close()
    return np.array(finished)


@pytest.mark.parametrize(
    ("id", "options"),
    [("Sprites-v0", {}), ("Sprites-v0", {"distractors": 0, "image_size": 64}), ("SpritesContinuous-v0", {})],
)
def test_a_perfect_policy_scores_one(id, options):
    # Distractors may hide the square's edges for a while, but not the goal for ever.
    scores = returns(id, lambda env, mask: np.stack([scripted(m, "Continuous" in id) for m in mask]), **options)
    assert scores.max() <= 1 + 1e-6 and scores.mean() > 0.99 and np.median(scores) == pytest.approx(1)


@pytest.mark.parametrize("id", ["Sprites-v0", "SpritesContinuous-v0"])
def test_a_random_policy_scores_little_and_resting_nothing(id):
    scores = returns(id, lambda env, _: env.action_space.sample(), episodes=48, image_size=8, distractors=0)
    assert scores.mean() < 0.2
    rest = returns(id, lambda env, _: np.zeros_like(env.action_space.sample()), episodes=8, image_size=8)
    np.testing.assert_allclose(rest, 0, atol=1e-6)


def test_pictures_are_drawn_at_the_size_asked_for():
    env = envs.make("gym:phyxdream/Sprites-v0", num_envs=2, image_size=48)
    observation, info = env.reset()
    assert {k: v.shape for k, v in observation.items()} == {"image": (2, 3, 48, 48)} and "segmentation" not in info
    direct, _ = SpritesEnv(48).reset(seed=0)
    np.testing.assert_array_equal(observation["image"][0], direct.transpose(2, 0, 1))
    env.close()


def test_segmentation_goes_into_info_and_fits_the_picture():
    env = envs.make("gym:phyxdream/Sprites-v0", num_envs=2, image_size=(40, 24), segmentation=True, distractors=3)
    observation, info = env.reset()
    for _ in range(2):
        assert list(observation) == ["image"] and observation["image"].shape == (2, 3, 40, 24)
        mask = info["segmentation"]
        assert mask.shape == (2, 40, 24) and mask.dtype == np.int32 and set(np.unique(mask)) <= set(range(6))
        observation, _, _, _, info = env.step(np.zeros(2, int))
    red = observation["image"].astype(int)[:, 0] - observation["image"][:, 1]
    assert (red[mask == 2] > 100).mean() > 0.85 > 0.05 > (red[mask != 2] > 100).mean()
    env.close()


@pytest.mark.parametrize("id", ["gym:Pendulum-v1", "envpool:Catch-v0"])
def test_segmentation_where_there_is_none(id):
    with pytest.raises(envs.EnvError, match="segmentation"):
        envs.make(id, num_envs=1, segmentation=True)


def test_same_seed_same_episodes(rollout, assert_same):
    def play(seed):
        return rollout(envs.make("gym:phyxdream/Sprites-v0", num_envs=2, seed=seed, distractors=2), 60)

    assert_same(play(3), play(3))
    assert not np.array_equal(play(3)[0][0]["image"], play(4)[0][0]["image"])


def test_gymnasium_makes_it_too():
    env = gymnasium.make("phyxdream/Sprites-v0", render_mode="rgb_array", size=16)
    observation, _ = env.reset(seed=1)
    np.testing.assert_array_equal(env.render(), observation)
    assert env.observation_space.contains(observation)
    with pytest.raises(ValueError, match="distractors"):
        SpritesEnv(distractors=-1)
    with pytest.raises(ValueError, match="size"):
        SpritesEnv(size=0)
