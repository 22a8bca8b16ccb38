import contextlib
from multiprocessing.connection import Listener
from types import SimpleNamespace

import numpy as np


class UnityCommunicatorStoppedException(Exception):
    pass


class UnityWorkerInUseException(Exception):
    pass


class UnityEnvironment:
    def __init__(self, file_name, base_port, seed, timeout_wait, side_channels):
        self.behavior_specs, self._steps, self._actions = {}, {}, {}
        self._time_scale = side_channels[0].time_scale
        try:
            listener = Listener(("localhost", base_port))
        except OSError:
            raise UnityWorkerInUseException from None
        while True:
            self._connection = listener.accept()
            try:
                self._connection.send({"seed": seed})
                self._exchange({"reset": True, "actions": {}, "time_scale": self._time_scale}, expect_reply=False)
                if self._connection.poll(None):
                    self._held = self._connection.recv()
                    return
            except (EOFError, OSError):
                continue  # someone who only looked whether we listen

    def _exchange(self, request, expect_reply=True):
        self._connection.send(request)
        if expect_reply:
            self._take(self._connection.recv())

    def _take(self, reply):
        if reply is None:
            raise UnityCommunicatorStoppedException
        self._steps = {}
        for name, agents in reply["brains"].items():
            decisions, terminals = {}, {}
            for a in agents:
                observations = [np.array(values, np.float32).reshape(shape) for _, shape, values in a["observations"]]
                if any(np.isnan(each).any() for each in observations):
                    raise RuntimeError("The observations provided had NaN values.")
                step = SimpleNamespace(
                    agent_id=np.int32(a["id"]), obs=observations, reward=np.float32(a["reward"]),
                    group_reward=np.float32(a["group_reward"]), interrupted=np.bool_(a["interrupted"]),
                    action_mask=[np.array(a["mask"], bool)] if a["mask"] else None,
                )  # fmt: skip
                (terminals if a["done"] else decisions)[np.int32(a["id"])] = step
            self._steps[name] = decisions, terminals
            if agents and name not in self.behavior_specs:
                self.behavior_specs[name] = SimpleNamespace(
                    observation_specs=[SimpleNamespace(name=n, shape=s) for n, s, _ in agents[0]["observations"]],
                    action_spec=SimpleNamespace(
                        continuous_size=reply["continuous"], discrete_branches=tuple(reply["branches"])
                    ),
                )

    def reset(self):
        if self._held is not None:  # the answer to the first reset came with the connection
            reply, self._held = self._held, None
            return self._take(reply)
        self._exchange({"reset": True, "actions": {}})

    def step(self):
        actions, self._actions = self._actions, {}
        self._exchange({"reset": False, "actions": actions})

    def set_actions(self, name, action):
        given = action.continuous if action.continuous is not None else action.discrete
        assert given.dtype == (np.float32 if action.discrete is None else np.int32)
        self._actions[name] = given.tolist()

    def get_steps(self, name):
        return self._steps.get(name, ({}, {}))

    def close(self):
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._connection.close()
