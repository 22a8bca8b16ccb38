"""Frames a second of the environments, acting at random: `python bench/bench_envs.py [id ...]`.

Beside ours it times the bare backend's own step for envpool, so that the price of our face is seen.
"""

from __future__ import annotations

import argparse
import statistics
import time

from phyxdream import envs
from phyxdream.envs import envpool as pool
from phyxdream.errors import MissingDependency

IDS = [
    "envpool:Catch-v0",
    "envpool:CartPole-v1",
    "envpool:CartpoleBalance-v1",
    "envpool:WalkerWalk-v1",
    "envpool:Pong-v5",
    "envpool:CoinrunEasy-v0",
    "envpool:HandManipulateBlockRotateZDense-v1",
    "gym:Pendulum-v1",
    "dmc:cartpole_balance",
]


def frames_per_second(step, actions, num_envs: int, seconds: float) -> float:
    """Median over five stretches of `seconds / 5` each."""
    rates = []
    for _ in range(5):
        start, steps = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds / 5:
            step(actions[steps % len(actions)])
            steps += 1
        rates.append(steps * num_envs / elapsed)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", default=IDS)
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5)
    arguments = parser.parse_args()
    print(f"{'environment':46} {'frames/s':>9} {'bare':>9}   ({arguments.num_envs} environments)")
    for id in arguments.ids:
        try:
            env = envs.make(id, num_envs=arguments.num_envs)
        except MissingDependency as error:
            print(f"{id:46} left out: {error}")
            continue
        env.reset()
        env.action_space.seed(0)
        actions = [env.action_space.sample() for _ in range(64)]
        ours = frames_per_second(env.step, actions, env.num_envs, arguments.seconds)
        bare = ""
        if isinstance(env._backend, pool.EnvPool):
            backend_actions = [env._act(action, env.num_envs) for action in actions]
            rate = frames_per_second(env._backend._pool.step, backend_actions, env.num_envs, arguments.seconds)
            bare = f"{rate:9.0f}"
        print(f"{id:46} {ours:9.0f} {bare:>9}", flush=True)
        env.close()


if __name__ == "__main__":
    main()
