"""Plays a Unity build: started as one, it connects as a client to the port it is told and plays a walk on a line.

    build.py {grpc|plain} --mlagents-port PORT [flags]

With `grpc` it speaks ML-Agents' own protocol, with the messages that mlagents_envs brings; with `plain` it sends the
same content to the stub beside it, so that everything but the protocol can be tested where mlagents_envs is missing.

The walker starts at a random place of -2..2, drawn from the seed. Its action moves it; beyond ±3 the episode
terminates, after 5 steps it is interrupted. It observes place, steps and the time scale as a vector, and a picture with
a bright column where it is. Its reward is its place; its group's is 0.25.
"""

import argparse
import os
import random
import signal
import struct
import sys
import time
import uuid

HEIGHT, WIDTH = 6, 8
ENGINE = uuid.UUID("e951342c-4f7e-11ea-b238-784f4387d1f7")  # the side channel of the engine's configuration
TIME_SCALE = 2


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("protocol", choices=["grpc", "plain"])
    parser.add_argument("--mlagents-port", type=int, required=True)
    parser.add_argument("-nographics", action="store_true")
    parser.add_argument("-batchmode", action="store_true")
    parser.add_argument("--branches", type=int, nargs="*", default=[])
    parser.add_argument("--continuous", type=int, default=0)
    parser.add_argument("--behaviors", nargs="+", default=["Walker?team=0"])
    parser.add_argument("--agents", type=int, default=1)
    parser.add_argument("--stranger-at", type=int, help="another agent than before asks at this message")
    parser.add_argument("--gap", type=int, default=0, help="messages without a decision, before every one")
    parser.add_argument("--at-once", action="store_true", help="an end and the next decision in one message")
    parser.add_argument("--mask", type=int, nargs="*", default=[], help="masked actions")
    parser.add_argument("--late", type=int, default=0, help="messages before there is any agent")
    parser.add_argument("--png", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--names", nargs=2, default=["Place", "Camera"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the picture's numbers")
    parser.add_argument("--twice", action="store_true", help="every observation twice")
    parser.add_argument("--nan-at", type=int)
    parser.add_argument("--crash-at", type=int)
    parser.add_argument("--exit-at", type=int)
    parser.add_argument("--quit-at", type=int)
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--stay", action="store_true", help="ignore that it shall quit")
    parser.add_argument("--never", action="store_true", help="do not connect")
    parser.add_argument("--pid-file")
    return parser.parse_args()


class Walk:
    def __init__(self, flags, seed):
        self.flags = flags
        self.random = random.Random(seed)
        self.agent = 0
        self.time_scale = 0.0
        self.begin()

    def begin(self):
        self.place, self.steps = float(self.random.randint(-2, 2)), 0
        self.agent += 1  # a new number for every episode

    def move(self, action):
        """The end of an episode, if this is one."""
        self.place += action
        self.steps += 1
        if abs(self.place) <= 3 and self.steps < 5:
            return None
        end = self.info(done=True, interrupted=abs(self.place) <= 3)
        self.begin()
        return end

    def info(self, done=False, interrupted=False, agent=None):
        f = self.flags
        column = int(self.place) + 3
        bright = [0.2 * channel + 0.4 if x == column else 0.0 for channel in range(3) for _ in range(HEIGHT)
                  for x in range(WIDTH)]  # fmt: skip
        shape = (3, HEIGHT, WIDTH)
        if f.channels_last:
            shape, size = (HEIGHT, WIDTH, 3), HEIGHT * WIDTH
            bright = [bright[channel * size + i] for i in range(size) for channel in range(3)]
        observations = [(f.names[0], (3,), [self.place, float(self.steps), self.time_scale])]
        if not f.no_picture:
            observations.append((f.names[1], shape, [f.scale * value for value in bright]))
        return {
            "id": self.agent if agent is None else agent, "done": done, "interrupted": interrupted,
            "reward": self.place if self.steps else 99.0,  # what comes with a first step is nobody's
            "group_reward": 0.25, "mask": [a in f.mask for a in range(f.branches[0])] if f.mask else [],
            "observations": observations * (2 if f.twice else 1),
        }  # fmt: skip


def play(flags, link):
    seed = link.initialize()
    walk = Walk(flags, seed)
    behavior, messages, ready, waiting, end = flags.behaviors[0], 0, not flags.late, 0, None
    request = link.first()
    while request is not None:
        for name, at in (("crash", flags.crash_at), ("exit", flags.exit_at), ("hang", flags.hang_at)):
            if messages == at:
                print("the walker stumbles", flush=True)
                if name == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                elif name == "exit":
                    os._exit(3)
                time.sleep(600)
        messages += 1
        walk.time_scale = request.get("time_scale", walk.time_scale)
        ready = ready or messages > flags.late
        agents = []
        if request["reset"]:
            walk.begin()
            waiting, end = flags.gap, None
        elif request["actions"].get(behavior):
            action = request["actions"][behavior][0]
            end = walk.move(action[0] if flags.continuous else int(action[0]) - 1)
            waiting = flags.gap
        elif waiting:
            waiting -= 1
        if end is not None and not waiting:
            agents.append(end)
        if not waiting and (end is None or flags.at_once):
            agents += [walk.info(agent=walk.agent + 100 * i) for i in range(flags.agents)]
        if not waiting:
            end = None
        if messages == flags.stranger_at:
            agents = [walk.info(agent=77)]
        if messages == flags.nan_at:
            agents[0]["observations"][0][2][0] = float("nan")
        brains = {name: agents for name in flags.behaviors} if ready else {}
        request = link.exchange(brains, quit=messages == flags.quit_at)


class Grpc:
    def __init__(self, flags):
        import grpc
        from mlagents_envs.communicator_objects.unity_to_external_pb2_grpc import UnityToExternalProtoStub

        port = flags.mlagents_port
        options = [("grpc.enable_http_proxy", 0)]
        self.stub = UnityToExternalProtoStub(grpc.insecure_channel(f"localhost:{port}", options=options))
        self.flags, self.known = flags, set()

    def message(self):
        from mlagents_envs.communicator_objects.unity_message_pb2 import UnityMessageProto

        message = UnityMessageProto()
        message.header.status = 200
        return message

    def initialize(self):
        message = self.message()
        output = message.unity_output.rl_initialization_output
        output.name, output.communication_version, output.package_version = "Walk", "1.5.0", "2.0.0"
        output.capabilities.baseRLCapabilities = True
        return self.stub.Exchange(message).unity_input.rl_initialization_input.seed

    def first(self):
        return self.read(self.stub.Exchange(self.message()))

    def read(self, reply):
        if reply.header.status != 200:
            return None
        given = reply.unity_input.rl_input
        actions = {
            name: [list(each.discrete_actions or each.continuous_actions) for each in value.value]
            for name, value in given.agent_actions.items()
        }
        request = {"reset": given.command == 1, "actions": actions}
        data, at = given.side_channel, 0
        while at < len(data):
            channel, (size,) = uuid.UUID(bytes_le=data[at : at + 16]), struct.unpack_from("<i", data, at + 16)
            kind = struct.unpack_from("<i", data, at + 20)[0] if size >= 4 else None
            if channel == ENGINE and kind == TIME_SCALE:
                request["time_scale"] = struct.unpack_from("<f", data, at + 24)[0]
            at += 20 + size
        return request

    def exchange(self, brains, quit):
        message = self.message()
        message.header.status = 500 if quit else 200
        for name, agents in brains.items():
            if name not in self.known and agents:  # once, with the first agents
                self.known.add(name)
                brain = message.unity_output.rl_initialization_output.brain_parameters.add()
                brain.brain_name, brain.is_training = name, True
                brain.action_spec.num_continuous_actions = self.flags.continuous
                brain.action_spec.num_discrete_actions = len(self.flags.branches)
                brain.action_spec.discrete_branch_sizes.extend(self.flags.branches)
            infos = message.unity_output.rl_output.agentInfos[name]
            for agent in agents:
                self.fill(infos.value.add(), agent)
        call = self.stub.Exchange.future(message)
        if quit:  # nobody answers that
            time.sleep(0.2)
            return None
        return self.read(call.result())

    def fill(self, info, agent):
        info.id, info.reward, info.done = agent["id"], agent["reward"], agent["done"]
        info.max_step_reached, info.group_reward = agent["interrupted"], agent["group_reward"]
        info.action_mask.extend(agent["mask"])
        for name, shape, values in agent["observations"]:
            observation = info.observations.add()
            observation.name = name
            observation.shape.extend(shape)
            if self.flags.png and len(shape) == 3:
                observation.compression_type = 1
                observation.compressed_data = self.png(shape, values)
            else:
                observation.float_data.data.extend(values)

    def png(self, shape, values):
        import io

        import numpy
        from PIL import Image

        picture = numpy.rint(255 * numpy.array(values).reshape(shape)).astype(numpy.uint8)
        if not self.flags.channels_last:
            picture = numpy.moveaxis(picture, 0, -1)
        out = io.BytesIO()
        Image.fromarray(numpy.ascontiguousarray(picture)).save(out, "PNG")
        return out.getvalue()


class Plain:
    def __init__(self, flags):
        from multiprocessing.connection import Client

        self.connection = Client(("localhost", flags.mlagents_port))
        self.spec = {"continuous": flags.continuous, "branches": flags.branches}

    def initialize(self):
        return self.connection.recv()["seed"]

    def first(self):
        return self.connection.recv()

    def exchange(self, brains, quit):
        self.connection.send(None if quit else {"brains": brains, **self.spec})
        return None if quit else self.connection.recv()


def main():
    flags = arguments()
    if not flags.branches and not flags.continuous:
        flags.continuous = 1
    if flags.pid_file:
        with open(flags.pid_file, "a") as file:
            print(os.getpid(), file=file)
    if flags.never:
        time.sleep(600)
    try:
        play(flags, Grpc(flags) if flags.protocol == "grpc" else Plain(flags))
    except Exception as error:  # the server has gone: Unity quits, too
        print(f"disconnected: {type(error).__name__}", file=sys.stderr)
    if flags.stay:
        time.sleep(600)


if __name__ == "__main__":
    main()
