import doctest
import resource
import sys

import numpy as np
import pytest
import torch

import phyxdream.replay
import phyxdream.replay.buffer
import phyxdream.replay.loader
import phyxdream.replay.selectors
import phyxdream.replay.views
from phyxdream.errors import ConfigError, ReplayClosed
from phyxdream.replay import Prioritized, Replay, Uniform

TINY = {"number": ((), "int64"), "reward": ((), "float32"), "is_first": ((), "bool")}
IMAGE = {"image": ((3, 4, 6), "uint8"), "is_first": ((), "bool")}


# ---------------------------------------------------------------------------------------------- storing and sampling


def test_shapes_dtypes_and_order(coded):
    replay = Replay(coded.spec, capacity=40, num_envs=2)
    coded.fill(replay, np.zeros(2, np.int64), 8)
    batch = replay.sample(3, 8)
    assert list(batch) == [*coded.spec, "step_id"]
    for name, (shape, dtype) in coded.spec.items():
        assert batch[name].shape == (8, 3, *shape)
        assert batch[name].dtype == getattr(torch, dtype)
    assert batch["step_id"].shape == (8, 3) and batch["step_id"].dtype == torch.int64
    coded.check(batch, ends=[8, 8])


def test_batches_are_new_tensors(wrapped, same):
    replay, _ = wrapped()
    first = replay.sample(4, 3)
    kept = {name: value.clone() for name, value in first.items()}
    replay.sample(4, 3)
    assert same(first, kept)


def test_counters_and_properties(coded):
    replay, numbers = Replay(coded.spec, capacity=11, num_envs=3), np.zeros(3, np.int64)
    assert (len(replay), replay.total_added, replay.nbytes, replay.num_sequences(1)) == (0, 0, 0, 0)
    assert (replay.total_sampled, replay.num_episodes, replay.ready(1, 1)) == (0, 0, False)
    coded.fill(replay, numbers, 3)
    assert (len(replay), replay.total_added, replay.nbytes) == (9, 9, 9 * coded.step_bytes)
    assert [replay.num_sequences(n) for n in (1, 2, 3, 4, 2**62)] == [9, 6, 3, 0, 0]
    assert [replay.ready(5, n) for n in (1, 3, 4, 2**62)] == [True, True, False, False]
    coded.fill(replay, numbers, 7)
    assert (len(replay), replay.total_added, replay.capacity, replay.num_envs) == (11, 30, 11, 3)
    assert replay.num_sequences(4) == 1 + 1 + 0  # 11 steps over 3 envs: 4, 4 and 3
    assert replay.spec == coded.spec and replay.latents == {}
    assert replay.selector == Uniform() and replay.limiter is None
    replay.sample(5, 3)
    replay.sample(2, 4)
    assert replay.total_sampled == 23
    assert repr(replay).startswith("Replay(11 of 11 steps, 0.0 of 0.0 MB, 3 envs: image uint8[3, 5], tiny int8, ")
    replay.spec.clear()
    assert replay.spec == coded.spec


@pytest.mark.parametrize("length", [1, 2, 13, 64, 100])
@pytest.mark.parametrize("partial", [False, True])
def test_every_sequence_is_a_piece_of_what_was_written(coded, length, partial):
    envs, capacity = 5, 502  # two envs hold 101 steps, three hold 100
    replay, numbers = Replay(coded.spec, capacity, envs, seed=length), np.zeros(envs, np.int64)
    rng = np.random.default_rng(length) if partial else None
    rooms = np.array([101, 101, 100, 100, 100])
    sampled = 0
    for _ in range(12):
        coded.fill(replay, numbers, 40, rng)
        assert len(replay) == np.minimum(numbers, rooms).sum()
        if replay.num_sequences(length):
            env, number = coded.check(replay.sample(900 // length + 1, length), ends=numbers)
            assert (number < numbers[env]).all() and (number >= (numbers - rooms)[env]).all()
            sampled += env.size
    assert sampled > 6_000 and (numbers > rooms).all()


def test_step_id_is_the_env_and_the_number_of_the_step_in_it(coded):
    replay, numbers = Replay(TINY, 20, 2), np.zeros(2, np.int64)
    for _ in range(50):
        coded.fill(replay, numbers, 3)
        batch = replay.sample(20, 1)
        code = batch["number"]
        assert torch.equal(batch["step_id"], (code // 1_000_000 << 40) + code % 1_000_000)


def test_as_many_envs_as_rows(coded):
    """One row each: every env holds its newest step."""
    replay, numbers = Replay(coded.spec, 1000, 1000), np.zeros(1000, np.int64)
    coded.fill(replay, numbers, 3, np.random.default_rng(0))
    assert len(replay) == replay.num_sequences(1) == (numbers > 0).sum() and replay.num_sequences(2) == 0
    for batch in (
        replay.sample(3000, 1),
        replay.sample(500, 1, online=True),
        replay.sample(50, 1, cross_episodes=False),
    ):
        env, number = coded.check(batch, ends=numbers)
        assert (number == numbers[env] - 1).all()


def test_successive_draws_are_independent(coded):
    replay = Replay(TINY, 8, 1, seed=1)
    coded.fill(replay, np.zeros(1, np.int64), 8)
    draws = replay.sample(64_001, 1)["number"][0].numpy()
    counts = np.bincount(draws[:-1] * 8 + draws[1:], minlength=64)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 63) < 4 * np.sqrt(2 * 63)


def test_the_seed_decides(coded, wrapped, same):
    (a, _), (b, _), other = wrapped(seed=5), wrapped(seed=5), Replay(coded.spec, 23, 3, seed=6)
    coded.fill(other, np.zeros(3, np.int64), 38, np.random.default_rng(5))
    first, second = a.sample(6, 4), a.sample(6, 4)
    assert same(first, b.sample(6, 4)) and same(second, b.sample(6, 4))
    assert not same(first, second)
    assert not same(first, other.sample(6, 4))
    # Splitting the draws over calls does not change them.
    c, _ = wrapped(seed=5)
    parts = [c.sample(2, 4) for _ in range(3)]
    assert same(first, {name: torch.cat([part[name] for part in parts], 1) for name in first})


def test_is_last_is_repaired_in_the_batch_only(coded):
    """An episode that was abandoned ends for the learner where the next one begins, also at the last step drawn."""
    replay = Replay({"is_first": ((), "bool"), "is_last": ((), "bool")}, 8, 1)
    for first in (True, False, False, True, False):
        replay.add({"is_first": [first], "is_last": [False]})
    batch = replay.sample(60, 3)
    last = dict(zip(batch["step_id"].flatten().tolist(), batch["is_last"].flatten().tolist(), strict=True))
    assert last == {0: False, 1: False, 2: True, 3: False, 4: False}
    for step_id, is_last in zip(batch["step_id"].flatten().tolist(), batch["is_last"].flatten().tolist(), strict=True):
        assert is_last == (step_id == 2)
    newest = replay.sample(200, 1)
    assert not newest["is_last"][newest["step_id"] == 4].any()
    replay.add({"is_first": [True], "is_last": [False]})
    batch = replay.sample(200, 1)
    assert set(batch["step_id"][batch["is_last"]].tolist()) == {2, 4}
    assert not batch["is_first"][batch["step_id"] == 4].any()  # nothing but is_last is touched


def test_forced_is_first_leaves_the_storage_alone(wrapped, coded):
    replay, numbers = wrapped()
    batch = replay.sample(40, 4, force_is_first=True)
    assert batch["is_first"][0].all() and not batch["is_first"][1:].all()
    coded.check(batch, ends=numbers, forced=True)
    batch = replay.sample(40, 4)
    assert not batch["is_first"][0].all()
    coded.check(batch, ends=numbers)


def test_sequences_within_episodes(coded_with, coded):
    coded = coded_with(episode=4)
    replay, numbers = Replay(coded.spec, 200, 3), np.zeros(3, np.int64)
    coded.fill(replay, numbers, 60)
    batch = replay.sample(300, 3, cross_episodes=False)
    coded.check(batch, ends=numbers)
    assert not batch["is_first"][1:].any() and batch["is_first"][0].any()
    with pytest.raises(ValueError):
        replay.sample(1, 60, cross_episodes=False)
    with pytest.raises(ValueError, match="cross_episodes"):
        replay.sample(1, 3, online=True, cross_episodes=False)
    replay.sample(1, 60)


def test_whole_episodes(coded, wrapped):
    replay, numbers = wrapped(capacity=120)
    batch = replay.sample_episodes(50)
    mask = batch["mask"].numpy()
    assert batch["mask"].dtype == torch.bool
    lengths = mask.sum(0)
    assert mask.shape == (lengths.max(), 50)
    assert (mask == (np.arange(len(mask))[:, None] < lengths)).all()
    env, number = coded.check(batch, ends=numbers, where=mask)
    last = number[lengths - 1, np.arange(50)]
    assert batch["is_first"][0].all() and not batch["is_first"][1:].any()
    assert (coded.is_first(env[0], last + 1) | coded.is_last(env[0], last)).all()
    assert len(set(lengths.tolist())) > 3


def test_whole_episodes_of_nothing(coded):
    replay = Replay(TINY, 20, 1)
    assert replay.num_episodes == 0
    with pytest.raises(ValueError):
        replay.sample_episodes(1)
    for first in (True, False, False):
        replay.add({"number": [0], "reward": [0.0], "is_first": [first]})
    assert replay.num_episodes == 0
    with pytest.raises(ValueError):
        replay.sample_episodes(1)
    replay.add({"number": [7], "reward": [0.0], "is_first": [True]})
    assert replay.num_episodes == 1
    assert replay.sample_episodes(2)["mask"].shape == (3, 2)
    with pytest.raises(ValueError, match="batch_size"):
        replay.sample_episodes(0)


# ----------------------------------------------------------------------------------------------------------- latents


def test_latents_are_zeros_until_written_and_evicted_ids_are_ignored(coded):
    replay = Replay(coded.small_spec, 20, 2, latents=coded.latents)
    coded.fill(replay, np.zeros(2, np.int64), 5)
    batch = replay.sample(30, 5)
    assert list(batch) == [*coded.small_spec, *coded.latents, "step_id"]
    assert replay.latents == coded.latents
    assert not batch["deter"].any() and not batch["stoch"].any()
    ids = np.array([[0, 3], [1 << 40, -1]])
    assert replay.update(ids, **coded.latent(ids, 3)) == 3
    batch = replay.sample(200, 1)
    written = torch.from_numpy(np.isin(batch["step_id"].numpy(), [0, 3, 1 << 40]))
    expected = coded.latent(batch["step_id"].numpy(), 3)
    for name in coded.latents:
        value = torch.as_tensor(expected[name])
        assert torch.equal(batch[name][written], value[written])
        assert not batch[name][~written].any()
    coded.fill(replay, np.full(2, 5), 8)  # steps 0 to 2 go
    assert replay.update(ids, **coded.latent(ids, 4)) == 1
    batch = replay.sample(400, 1)
    assert set(batch["deter"][..., 2].flatten().tolist()) == {0.0, 4.0}
    assert set(batch["step_id"][batch["deter"][..., 2] == 4].tolist()) == {3}
    # The steps that took the rows of written ones begin with zeros.
    assert not batch["deter"][batch["step_id"] != 3].any() and not batch["stoch"][batch["step_id"] != 3].any()


def test_a_latent_may_come_with_the_step_or_be_left_out(coded):
    replay = Replay(coded.small_spec, 8, 2, latents=coded.latents)
    for number in range(11):
        step, latent = coded.small([0, 1], [number] * 2), coded.latent([number, 1 << 40 | number], 9)
        if number % 3 == 0:
            step |= latent
        elif number % 3 == 1:
            step |= {"deter": latent["deter"]}
        replay.add(step)
    batch = replay.sample(300, 1)
    number, expected = batch["number"] % 1_000_000, coded.latent(batch["step_id"].numpy(), 9)
    deter, stoch = number % 3 < 2, number % 3 == 0
    assert torch.equal(batch["deter"], torch.as_tensor(expected["deter"]) * deter[..., None])
    assert torch.equal(batch["stoch"], expected["stoch"] * stoch[..., None, None])


def test_the_later_of_two_entries_of_one_step_wins(coded):
    replay = Replay(coded.small_spec, 8, 1, latents=coded.latents)
    coded.fill(replay, np.zeros(1, np.int64), 3)
    ids = torch.tensor([1, 2, 1, 2, 1])
    values = torch.arange(5).float()
    replay.update(ids, deter=values[:, None].expand(5, 3), stoch=values[:, None, None].expand(5, 2, 2))
    batch = replay.sample(30, 3)
    assert (batch["deter"][:, :, 0] == torch.tensor([0.0, 4.0, 3.0])[:, None]).all()
    assert (batch["stoch"][:, :, 1, 0].float() == torch.tensor([0.0, 4.0, 3.0])[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: x.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1)]
)
def test_latents_of_another_float_type_are_converted(coded, dtype, form):
    replay = Replay(coded.small_spec, 64, 1, latents=coded.latents)
    coded.fill(replay, np.zeros(1, np.int64), 12)
    ids = torch.arange(12).view(4, 3)
    deter, stoch = torch.randn(4, 3, 3).to(dtype), torch.randn(4, 3, 2, 2).to(dtype)
    assert replay.update(form(ids), deter=form(deter), stoch=form(stoch)) == 12
    batch = replay.sample(1, 12)
    torch.testing.assert_close(batch["deter"][:, 0], deter.view(12, 3).float(), rtol=0, atol=0)
    assert torch.equal(batch["stoch"][:, 0], stoch.view(12, 2, 2).bfloat16())


def test_some_latents_of_a_step_may_be_written(coded):
    replay = Replay(coded.small_spec, 64, 1, latents=coded.latents)
    coded.fill(replay, np.zeros(1, np.int64), 2)
    latent = coded.latent(np.array([0, 1]), 5)
    assert replay.update([0, 1], stoch=latent["stoch"]) == 2
    batch = replay.sample(1, 2)
    assert torch.equal(batch["stoch"][:, 0], latent["stoch"]) and not batch["deter"].any()
    assert replay.update([0, 1], deter=latent["deter"]) == 2
    batch = replay.sample(1, 2)
    assert torch.equal(batch["stoch"][:, 0], latent["stoch"])
    assert torch.equal(batch["deter"][:, 0], torch.from_numpy(latent["deter"]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"deter": np.zeros((3, 4), np.float32)}, ValueError, "deter"),
        ({"deter": np.zeros((2, 3), np.float32)}, ValueError, "deter"),
        ({"deter": np.zeros((3, 3), bool)}, TypeError, "deter"),
        ({"reward": np.zeros(3, np.float32)}, ValueError, "reward"),
        ({"detr": np.zeros((3, 3), np.float32)}, ValueError, "detr.*deter"),
        ({"step_id": np.zeros(3)}, (TypeError, ValueError), "step_id"),
    ],
)
def test_a_bad_update_changes_nothing(coded, same, change, error, message):
    replay = Replay(coded.small_spec, 16, 1, latents=coded.latents)
    coded.fill(replay, np.zeros(1, np.int64), 3)
    ids = np.arange(3)
    replay.update(ids, **coded.latent(ids, 1))
    before = replay.sample(1, 3)
    with pytest.raises(error, match=message):
        replay.update(**{"step_id": ids, **coded.latent(ids, 2), **change})
    assert same(replay.sample(1, 3), before)


def test_ids_that_belong_to_no_stored_step_are_ignored(coded):
    replay = Replay(coded.small_spec, 16, 2, latents=coded.latents, selector=Prioritized())
    coded.fill(replay, np.zeros(2, np.int64), 11)
    # Not added yet, of no env, negative, the largest and the smallest there are.
    strange = np.array([11, 19, 1 << 39, 1 << 40 | 11, 2 << 40, 5 << 40 | 4, -1, -2, -(1 << 40), 2**63 - 1, -(2**63)])
    assert replay.update(strange, **coded.latent(np.zeros_like(strange), 3)) == 0
    replay.prioritize(strange, np.full(len(strange), 1e6))
    coded.fill(replay, np.full(2, 11), 1)
    assert not any(replay.read(env, 4, 8)["deter"].any() for env in (0, 1))
    assert (replay.sample(9, 1)["probability"] == 1 / 16).all()
    assert replay.update(np.zeros((0, 3), np.int64), deter=np.zeros((0, 3, 3), np.float32)) == 0


def test_an_update_without_latents(coded):
    replay = Replay(coded.small_spec, 16, 1)
    coded.fill(replay, np.zeros(1, np.int64), 3)
    with pytest.raises(ValueError, match="deter"):
        replay.update([0], deter=np.zeros((1, 3), np.float32))


# ------------------------------------------------------------------------------------------------- forms of the input


def test_conversions_of_the_same_kind(coded):
    replay = Replay(coded.spec, 40, 4)
    envs = np.arange(4)
    for number in range(8):
        step = coded.step(envs, np.full(4, number))
        step["image"] = np.asfortranarray(step["image"])
        step["tiny"] = step["tiny"].astype(np.int64)
        step["short"] = torch.from_numpy(step["short"].astype(np.int32))
        step["pair"] = step["pair"].astype(np.int64)
        step["number"] = torch.from_numpy(step["number"].astype(np.int32))
        step["feature"] = torch.from_numpy(step["feature"].astype(np.float64)).requires_grad_()
        step["half"] = step["half"].astype(">f4")
        step["brain"] = step["brain"].float().numpy() if number % 2 else step["brain"].double()
        step["reward"] = step["reward"].tolist() if number % 2 else step["reward"].astype(np.int32)
        step["is_first"] = np.repeat(step["is_first"], 2)[::2]
        replay.add(step)
    coded.check(replay.sample(50, 8), ends=[8] * 4)


def test_strides_of_every_kind(coded):
    """Negative, zero, padded and unaligned strides, of NumPy and torch."""
    replay, envs = Replay(coded.spec, 40, 4), np.arange(4)
    for number in range(8):
        step = coded.step(envs, np.full(4, number))
        for name, value in step.items():
            if name == "brain":
                step[name] = torch.stack([torch.zeros_like(value), value], 1)[:, 1]
            elif number % 4 == 0:
                step[name] = np.ascontiguousarray(value[::-1])[::-1]
            elif number % 4 == 1:
                step[name] = np.stack([value, value], -1)[..., 0]
            elif number % 4 == 2:
                raw = np.zeros(value.nbytes + 1, np.uint8)[1:].view(value.dtype).reshape(value.shape)
                raw[...] = value
                step[name] = raw
            else:
                step[name] = torch.from_numpy(value).unsqueeze(1).expand(4, 3, *value.shape[1:])[:, 2]
        replay.add(step)
    coded.check(replay.sample(50, 8), ends=[8] * 4)
    replay.add({**coded.step(envs, [8] * 4), "reward": np.broadcast_to(np.float32(3.5), 4)})
    assert (replay.sample(9, 9)["reward"][8] == 3.5).all()


def test_bfloat16_rounds_to_nearest_even():
    replay = Replay({"x": ((), "bfloat16"), "is_first": ((), "bool")}, 5000, 1)
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x00000001, 0x80000000]
    values = bits.view(np.float32)
    values = values[np.abs(values) < 3.3e38]  # what rounds to infinity is out of range
    for value in values:
        replay.add({"x": np.array([value]), "is_first": [False]})
    got = replay.sample(1, len(values))["x"][:, 0]
    assert torch.equal(got.view(torch.int16), torch.from_numpy(values).bfloat16().view(torch.int16))


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("spec_dtype, given", [("uint8", np.uint8), ("float32", np.float64), ("float32", np.float32)])
@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 4, 4), (4, 6, 6), (3, 64, 64)])
def test_hwc_pictures(tensor, spec_dtype, given, shape):
    replay = Replay({"image": (shape, spec_dtype), "is_first": ((), "bool")}, 40, 2)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (5, 2, *shape)).astype(given)
    forms = [
        lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)),
        lambda x: np.moveaxis(x, 1, -1),  # CHW in memory, seen as HWC
        lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)[:, ::-1])[:, ::-1],  # upside down, as renderers give
        lambda x: x,
        lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),  # HWC in memory, seen as CHW
    ]
    for image, form in zip(images, forms, strict=True):
        value = form(image)
        replay.add({"image": torch.from_numpy(value.copy()) if tensor else value, "is_first": [True, True]})
    batch = replay.sample(40, 5)
    env = batch["step_id"][0] >> 40
    np.testing.assert_array_equal(batch["image"].numpy(), images[:, env.numpy()].astype(spec_dtype))


@pytest.mark.parametrize(
    "spec_shape, given", [((3, 4, 6), (4, 3, 6)), ((3, 4, 6), (6, 4, 3)), ((2, 4, 6), (4, 6, 2)), ((5, 6), (6, 5))]
)
def test_other_orders_are_refused(spec_shape, given):
    replay = Replay({"image": (spec_shape, "uint8"), "is_first": ((), "bool")}, 40, 2)
    with pytest.raises(ValueError, match="image"):
        replay.add({"image": np.zeros((2, *given), np.uint8), "is_first": [True, True]})
    assert replay.total_added == 0


def test_a_shape_that_fits_both_ways_is_taken_as_it_is():
    replay = Replay({"image": ((3, 3, 3), "uint8"), "is_first": ((), "bool")}, 40, 1)
    image = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3)
    replay.add({"image": image, "is_first": [True]})
    np.testing.assert_array_equal(replay.sample(1, 1)["image"][0], image)


def test_the_caller_may_reuse_its_arrays(coded):
    replay, step = Replay(coded.spec, 10, 1), coded.step([0], [0])
    replay.add(step)
    for value in step.values():
        value.fill_(1) if torch.is_tensor(value) else value.fill(1)
    replay.add(coded.step([0], [1]))
    coded.check(replay.sample(4, 2), ends=[2])


def test_readonly_arrays_extra_references_and_no_envs(coded):
    replay, step = Replay(TINY, 10, 2), coded.small([0, 1], [0, 0])
    for value in step.values():
        value.setflags(write=False)
    before = {name: sys.getrefcount(value) for name, value in step.items()}
    for _ in range(10):
        replay.add(step)
    assert {name: sys.getrefcount(value) for name, value in step.items()} == before
    replay.add({name: value[:0] for name, value in step.items()}, [])
    assert replay.total_added == 20


# --------------------------------------------------------------------------------------------------------- bad input


GOOD = {"number": np.array([0, 1_000_000]), "reward": np.zeros(2, np.float32), "is_first": np.ones(2, bool)}

BAD_STEPS = [
    ([1, 2], None, TypeError, "step: got list, expected a dict of arrays"),
    ({}, None, ValueError, "step: no 'number', 'reward', 'is_first'; expected the keys number, reward, is_first"),
    ({**GOOD, "rewards": np.zeros(2)}, None, ValueError, "step: unknown key 'rewards'; did you mean 'reward'?"),
    ({**GOOD, "number": np.zeros((2, 1), int)}, None, ValueError, "number: got shape (2, 1), expected (2,)"),
    (GOOD, [0], ValueError, "number: got shape (2,), expected (1,)"),
    (
        {**GOOD, "number": np.zeros(2)},
        None,
        TypeError,
        "number: got dtype float64, expected int64 or another of its kind",
    ),
    ({**GOOD, "is_first": np.zeros(2, np.uint8)}, None, TypeError, "is_first: got dtype uint8, expected bool"),
    ({**GOOD, "reward": [1, "a"]}, None, TypeError, "reward: got dtype <U21, expected float32"),
    ({**GOOD, "reward": [[1], [1, 2]]}, None, TypeError, "reward: got [[1], [1, 2]], which is no array"),
    ({**GOOD, "reward": torch.zeros(2, device="meta")}, None, TypeError, "reward: got a tensor on meta, expected CPU"),
    (
        {**GOOD, "number": np.array([1, 2**63], np.uint64)},
        None,
        ValueError,
        "number: holds values beyond the range of int64",
    ),
    (
        {**GOOD, "reward": np.array([0, 1e300])},
        None,
        ValueError,
        "reward: the step of env 1 holds values beyond the range of float32",
    ),
    (
        {**GOOD, "reward": np.array([0, np.nan], np.float32)},
        None,
        ValueError,
        "reward: the step of env 1 has a NaN or infin",
    ),
    (
        {**GOOD, "reward": np.array([-np.inf, 0])},
        [1, 0],
        ValueError,
        "reward: the step of env 1 has a NaN or infinite",
    ),
    (GOOD, [0, 2], ValueError, "env_ids: got env 2, expected 0 to 1"),
    (GOOD, [-1, 0], ValueError, "env_ids: got env -1, expected 0 to 1"),
    (GOOD, [1, 1], ValueError, "env_ids: env 1 is named twice, expected every env at most once"),
    (GOOD, [0.0, 1.0], ValueError, "env_ids: got shape (2,) float64, expected a list of integers"),
    (GOOD, 0, ValueError, "env_ids: got shape () int64, expected a list of integers"),
    (GOOD, [True, False], ValueError, "env_ids: got shape (2,) bool, expected a list of integers"),
]


@pytest.mark.parametrize("step, env_ids, error, message", BAD_STEPS)
def test_a_bad_step_is_refused_whole(step, env_ids, error, message):
    replay = Replay(TINY, 10, 2)
    replay.add(GOOD)
    with pytest.raises(error) as caught:
        replay.add(step, env_ids)
    assert str(caught.value).startswith(message)
    assert replay.total_added == 2
    assert replay.sample(50, 1)["number"].unique().tolist() == [0, 1_000_000]


@pytest.mark.parametrize("dtype, value", [("int8", 128), ("int8", -129), ("int16", -40_000), ("int32", 2**31)])
def test_integers_that_do_not_fit_are_refused(dtype, value):
    replay = Replay({"x": ((2,), dtype), "is_first": ((), "bool")}, 10, 1)
    with pytest.raises(ValueError, match=f"x: holds values beyond the range of {dtype}"):
        replay.add({"x": np.array([[0, value]]), "is_first": [True]})
    assert len(replay) == 0


def test_a_bad_latent_in_a_step_is_refused_whole(coded):
    replay = Replay(coded.small_spec, 10, 1, latents=coded.latents)
    with pytest.raises(ValueError, match=r"deter: got shape \(1, 4\)"):
        replay.add({**coded.small([0], [0]), "deter": np.zeros((1, 4), np.float32)})
    assert replay.total_added == 0


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_every_number_of_a_reward_vector_is_checked(dtype):
    replay = Replay({"reward": ((3,), dtype), "is_first": ((), "bool")}, 10, 4)
    reward = torch.full((3, 3), torch.finfo(getattr(torch, dtype)).max, dtype=getattr(torch, dtype))
    step = {"reward": reward, "is_first": np.zeros(3, bool)}
    replay.add(step, [3, 1, 0])
    reward[1, 2] = -torch.inf
    with pytest.raises(ValueError, match="the step of env 1 has"):
        replay.add(step, [3, 1, 0])
    assert len(replay) == 3


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"spec": [("a", 1)]}, TypeError, "spec: got list, expected a dict of key: (shape, dtype)"),
        ({"spec": {"number": ((), "int64")}}, ValueError, "spec: 'is_first' must be there as ((), 'bool')"),
        ({"spec": {"is_first": ((), "uint8")}}, ValueError, "spec: 'is_first' must be there as ((), 'bool')"),
        ({"spec": {**TINY, "is_last": ((2,), "bool")}}, ValueError, "spec: 'is_last'"),
        ({"spec": {**TINY, "step_id": ((), "int64")}}, ValueError, "spec: the key 'step_id' cannot be used"),
        ({"spec": {**TINY, "mask": ((), "bool")}}, ValueError, "spec: the key 'mask' cannot be used"),
        ({"spec": {**TINY, "a\0b": ((), "int64")}}, ValueError, "spec: the key 'a\\x00b' cannot be used"),
        ({"spec": {**TINY, 3: ((), "int64")}}, ValueError, "spec: the key 3 cannot be used"),
        ({"spec": {**TINY, "x": 5}}, TypeError, "spec: key 'x' has 5, expected (shape, dtype)"),
        ({"spec": {**TINY, "x": (3, "uint8")}}, TypeError, "spec: key 'x' has (3, 'uint8'), expected (shape, dtype)"),
        ({"spec": {**TINY, "x": ((), "fp8")}}, TypeError, "spec: key 'x' has ((), 'fp8'), expected (shape, dtype)"),
        (
            {"spec": {**TINY, "x": ((), "float64")}},
            ValueError,
            "spec: key 'x' has dtype float64, expected one of uint8",
        ),
        ({"spec": {**TINY, "x": ((0,), "uint8")}}, ValueError, "spec: a side of 'x': got 0, expected 1 or more"),
        ({"latents": {"number": ((), "float32")}}, ValueError, "latents: "),
        ({"latents": [1]}, TypeError, "latents: "),
        ({"capacity": 0}, ValueError, "capacity: got 0, expected 1 or more"),
        ({"capacity": 1e6}, TypeError, "capacity: got 1000000.0 (float), expected an integer"),
        ({"capacity": 2**63}, ValueError, "capacity: got 9223372036854775808, expected 1 or more and below 2**63"),
        ({"capacity": 3}, ValueError, "capacity: got 3, expected at least one step for each of 4 envs"),
        ({"num_envs": True}, TypeError, "num_envs: got True (bool), expected an integer"),
        ({"num_envs": 2**24, "capacity": 2**25}, ValueError, "num_envs: got 16777216, expected at most 8388608"),
        ({"seed": -1}, ValueError, "seed: got -1, expected 0 or more"),
        ({"capacity": 2**50}, ConfigError, "capacity: 1125899906842624 steps need 14636698.8 GB, this machine has"),
        ({"capacity": 2**62}, ConfigError, "capacity: 4611686018427387904 steps need"),
        ({"spec": {**TINY, "x": ((2**40, 2**40), "uint8")}}, ConfigError, "capacity: one step of 'x' has more bytes"),
        ({"selector": "uniform"}, TypeError, "selector: "),
        ({"limiter": 4}, TypeError, "limiter: "),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        Replay(**{"spec": TINY, "capacity": 100, "num_envs": 4, **arguments})
    assert str(caught.value).startswith(message)


def test_bad_sample_arguments(coded):
    replay, numbers = Replay(TINY, 100, 4), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="no env has 1 steps yet; 0 steps are stored in all, 0 in the longest env"):
        replay.sample(1, 1)
    coded.fill(replay, numbers, 7)
    replay.add(coded.small([2], [7]), [2])
    with pytest.raises(
        ValueError, match="length: no env has 9 steps yet; 29 steps are stored in all, 8 in the longest"
    ):
        replay.sample(1, 9)
    with pytest.raises(ValueError, match="batch_size: got 0, expected 1 or more"):
        replay.sample(0, 1)
    with pytest.raises(TypeError, match=r"length: got 2\.5 \(float\), expected an integer"):
        replay.sample(1, 2.5)
    with pytest.raises(ValueError, match="length: got -3"):
        replay.num_sequences(-3)
    assert replay.total_sampled == 0


# --------------------------------------------------------------------------------------------- capacity and memory


@pytest.mark.parametrize(
    "text, size",
    [
        ("1MB", 10**6),
        ("1 MB", 10**6),
        ("512 kB", 512_000),
        ("1.5MiB", 3 * 2**19),
        ("1GB", 10**9),
        ("0.25GiB", 2**28),
        ("100000B", 100_000),
    ],
)
def test_capacity_in_bytes(text, size):
    replay = Replay(IMAGE, text, 2)
    step = 3 * 4 * 6 + 1
    assert 0.9 * size <= replay.capacity * step <= size
    assert replay.capacity > (size - 2 * step) / step * 0.9


def test_latents_count_as_bytes(coded):
    plain, more = Replay(TINY, "1MB", 1), Replay(TINY, "1MB", 1, latents={"h": ((13,), "float32")})
    assert plain.capacity == 10**6 // 13 and more.capacity == 10**6 // (13 + 52)
    coded.fill(more, np.zeros(1, np.int64), 3)
    assert more.nbytes == 3 * 65


@pytest.mark.parametrize(
    "text", ["", "GB", "8", "8 XB", "8 GB 3", "-1GB", "0GB", "nanGB", "infGB", "1,5GB", "8GBs", "1e400GB"]
)
def test_bad_capacity_texts(text):
    with pytest.raises(ValueError, match="capacity: "):
        Replay(IMAGE, text, 1)


def test_a_capacity_in_bytes_that_cannot_be():
    with pytest.raises((ValueError, ConfigError), match="capacity: "):
        Replay(IMAGE, "9" * 400 + "GB", 2)
    with pytest.raises(ValueError, match="capacity: "):
        Replay(IMAGE, "100B", 2)  # one step for each of two envs takes 146
    with pytest.raises(ConfigError, match=r"capacity: .*this machine has"):
        Replay(IMAGE, "1000000GB", 2)


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_as_it_fills():
    with open("/proc/meminfo") as meminfo:
        half = int(meminfo.readline().split()[1]) * 1024 // 2
    before = resident()
    replay = Replay({"image": ((3, 64, 64), "uint8"), "is_first": ((), "bool")}, half // 12289, 8)
    assert resident() - before < 2**25  # a huge page may be touched per env and key
    for number in range(256):
        replay.add({"image": np.full((8, 3, 64, 64), number, np.uint8), "is_first": np.zeros(8, bool)})
    assert 2**24 < resident() - before < 2**26 + 2**25  # 25 MB are stored
    assert replay.sample(3, 256)["image"][:, 0, 0, 0, 0].tolist() == list(range(256))
    filled = resident()
    del replay
    assert filled - resident() > 2**24


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prefault_takes_the_memory_at_once():
    before = resident()
    replay = Replay({"image": ((3, 64, 64), "uint8"), "is_first": ((), "bool")}, 5000, 3, prefault=True)
    assert 5000 * 12289 <= resident() - before < 2 * 5000 * 12289
    del replay
    assert resident() - before < 2**24


# --------------------------------------------------------------------------------------------------------------- close


def test_what_is_stored_stays_readable_after_closing(coded, wrapped, tmp_path):
    """Closing ends waits for the limiter (test_limiter.py), nothing else."""
    replay, numbers = wrapped()
    with replay as same_one:
        assert same_one is replay
    replay.close()  # once more is fine
    coded.check(replay.sample(3, 2), ends=numbers)
    with replay.loader(3, 2) as loader:
        coded.check(next(loader), ends=numbers)
    replay.save(tmp_path / "replay")
    assert len(Replay.load(tmp_path / "replay")) == len(replay)
    assert issubclass(ReplayClosed, RuntimeError)


def test_reading_steps_of_an_env(coded, wrapped):
    replay, numbers = wrapped(latents=coded.latents)
    rooms = [8, 8, 7]
    assert replay.stored_steps == [range(end - room, end) for end, room in zip(numbers, rooms, strict=True)]
    for env, stored in enumerate(replay.stored_steps):
        for first, count in [(stored[0], len(stored)), (stored[0], 1), (stored[-1], 1), (stored[2], 4), (stored[3], 0)]:
            steps = replay.read(env, first, count)
            assert list(steps) == [*coded.spec, *coded.latents]
            for name, value in coded.step([env] * count, range(first, first + count)).items():
                assert torch.equal(steps[name], torch.as_tensor(value)), name  # as written: is_last is not repaired
        assert list(replay.read(env, stored[0], 2, ["deter", "pair"])) == ["deter", "pair"]
        for first, count in [(stored[0] - 1, 2), (stored[-1], 2), (stored[-1] + 1, 1), (0, 1), (2**62, 2**62)]:
            with pytest.raises(ValueError, match="first: "):
                replay.read(env, first, count)
    with pytest.raises(ValueError, match="env: got 3"):
        replay.read(3, 0, 1)
    with pytest.raises(ValueError, match="keys: unknown key 'pear'; did you mean 'pair'"):
        replay.read(0, int(numbers[0]) - 1, 1, ["pear"])


@pytest.mark.parametrize("name", ["buffer", "loader", "selectors", "views"])
def test_the_examples_in_the_docstrings(name):
    assert doctest.testmod(getattr(phyxdream.replay, name)).failed == 0


def test_the_buffer_has_an_example():
    assert doctest.testmod(phyxdream.replay.buffer).attempted > 0
