import pytest
import torch

from phyxdream.agents import DreamerAgent, DreamerConfig


@pytest.fixture
def in_two_halves():
    """Trains an agent, and another with the same configuration that stops after `at` steps and is resumed: they end
    with the same weights. Returns the agent at the stop."""

    def train(whole: DreamerAgent, at: int) -> DreamerAgent:
        result = whole.train(quiet=True)
        assert result.evaluation is not None and result.report.exists()
        config = whole.config.to_dict()
        part = {**config, "logdir": f"{whole.config.logdir}-half", "total_steps": at}
        half = DreamerAgent(DreamerConfig.from_dict(part))
        half.train(quiet=True)
        resumed = DreamerAgent(DreamerConfig.from_dict({**part, "total_steps": config["total_steps"]}))
        resumed.train(resume=True, quiet=True)
        for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=key)
        return half

    return train
