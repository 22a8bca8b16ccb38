import numpy as np
import torch

from phyxdream.agents import DreamerAgent
from phyxdream.replay import Replay
from phyxdream.train.driver import Driver, make_env
from phyxdream.train.video import _longest_episodes, open_loop_video


def test_longest_episodes():
    first = torch.zeros(6, 3, dtype=torch.bool)
    first[2, 0] = first[0, 1] = first[5, 1] = True
    start, stop = _longest_episodes(first)
    assert start.tolist() == [2, 0, 0] and stop.tolist() == [6, 5, 6]


def test_sequences_are_replayed_pictures_of_one_episode(tiny, tmp_path):
    import gymnasium

    class Square(gymnasium.Env):
        """A bright pixel that walks one column a step; an episode is eight steps."""

        observation_space = gymnasium.spaces.Box(0, 255, (8, 9, 3), np.uint8)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, seed=None, options=None):
            self.t = 0
            return self.picture(), {}

        def step(self, action):
            self.t += 1
            return self.picture(), 0.0, self.t == 8, False, {}

        def picture(self):
            image = np.zeros((8, 9, 3), np.uint8)
            image[3, self.t] = 255
            return image

    gymnasium.register("PhyxdreamSquare-v0", Square)
    tiny.env = "gym:PhyxdreamSquare-v0"
    agent = DreamerAgent(tiny)
    driver = Driver(make_env(tiny))
    replay = Replay(agent.replay_spec, 500, 2)
    assert open_loop_video(agent, replay) is None
    for _ in range(100):
        replay.add(driver.row)
        driver.step(np.zeros(2, np.int64))
    video = open_loop_video(agent, replay)
    assert video["truth"].shape == video["model"].shape == (9, 6, 8, 9, 3)
    assert video["truth"].dtype == video["model"].dtype == np.uint8
    columns = video["truth"][:, :, 3, :, 0].argmax(-1)
    np.testing.assert_array_equal(columns, np.tile(np.arange(9)[:, None], (1, 6)))
    assert video["context"] == 4
    driver.env.close()


def test_no_pictures_no_video(tiny):
    agent = DreamerAgent(tiny)
    assert open_loop_video(agent, Replay(agent.replay_spec, 100, 2)) is None
