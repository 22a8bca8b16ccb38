import numpy as np
import torch

from phyxdream.agents import DreamerAgent
from phyxdream.train.evaluate import evaluate


def test_counts_and_determinism(tiny):
    agent = DreamerAgent(tiny)
    first, again = evaluate(agent, 5, seed=7), evaluate(agent, 5, seed=7)
    assert len(first.returns) == len(first.lengths) == 5
    assert first == again
    assert first.mean == np.mean(first.returns)
    np.testing.assert_array_equal(first.returns, first.lengths)  # CartPole pays one per step


def test_fewer_episodes_than_environments(tiny):
    assert len(evaluate(DreamerAgent(tiny), 1, seed=0).returns) == 1


def test_training_state_is_left_alone(tiny):
    agent = DreamerAgent(tiny)
    before = {k: g.get_state() for k, g in agent.generators.items()}
    weights = {k: v.clone() for k, v in agent.model.state_dict().items()}
    evaluate(agent, 2, seed=0, explore=True)
    assert all(torch.equal(before[k], g.get_state()) for k, g in agent.generators.items())
    assert all(torch.equal(weights[k], v) for k, v in agent.model.state_dict().items())
