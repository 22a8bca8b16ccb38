"""Every knob of an agent and its training run, as one flat dataclass with the literature's names."""

from __future__ import annotations

import ast
import contextlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from phyxdream.errors import ConfigError, suggest


@dataclass
class DreamerConfig:
    """Configuration of a run. The defaults are DreamerV3 (2024 code) at size 12M.

    Fields left at None are filled in by `resolve`: the sizes from `size`, the others as their comment says.
    """

    # -- Task
    preset: str = "dreamer_v3"
    """Preset whose values the other options start from."""
    agent: Literal[
        "dreamer_v1", "dreamer_v2", "dreamer_v3", "planet", "dreaming", "dreaming_v2", "daydreamer",
        "world_models"
    ] = "dreamer_v3"  # fmt: skip
    """Whose losses, behaviour and optimiser: a file of phyxdream/agents each."""
    env_backend: Literal["envpool", "gym", "dmc", "robotics", "unity_mlagents"] = "envpool"
    """Where `env` is looked up when it carries no "backend:" prefix."""
    env: str = "Catch-v0"
    """Environment id, with or without its backend: "Catch-v0" or "envpool:Catch-v0"."""
    num_envs: int = 8
    """Environments stepped together; under torchrun, by each process."""
    action_repeat: int = 1
    """Environment steps per action; rewards are summed."""
    time_limit: int | None = None
    """Environment steps after which an episode is cut off (None: the environment's own limit)."""
    pixels: bool | None = None
    """Ask for rendered pictures instead of states (None: what the environment gives)."""
    image_size: int | None = None
    """Side in pixels to which pictures are resized or rendered (None: as they are, 64 when rendered)."""
    camera: int | None = None
    """Camera id for rendered pictures (None: the environment's own)."""
    env_options: tuple[str, ...] = ()
    """What else the environment takes, see `envs.make`: NAME=VALUE each, such as full_action_space=true."""

    # -- Run
    total_steps: int = 1_000_000
    """Environment steps, action repeat included, of all processes together."""
    seed: int = 0
    device: str = "auto"
    """"auto" takes a CUDA device when there is one, else the CPU. Under torchrun every process takes its own GPU."""
    cuda_graph: bool = True
    """On a CUDA device, record the update once as a CUDA graph and replay it; not under torchrun, nor of World Models,
    whose CMA-ES is on the host."""
    logdir: str | None = None
    """Run directory (None: runs/<preset>-<env>-<date>)."""
    log_every: int = 1_000
    """Environment steps between rows of metrics."""
    eval_every: int = 0
    """Environment steps between evaluations (0: only at the end)."""
    eval_episodes: int = 20
    checkpoint_every: float = 300.0
    """Seconds between checkpoints."""
    parallel: bool = False
    """Act in processes of their own while this one learns, each as fast as it can (DayDreamer), instead of by turns. On
    the CPU; environments that a script registers are found as "gym:module:Id-v0". Such a run cannot be repeated bit for
    bit."""
    actors: int = 1
    """Of a parallel run: how many actors, with `num_envs` environments each."""
    actor_backend: Literal["process", "ray"] = "process"
    """Where actors run: processes of this machine, or wherever Ray places them (pip install "phyxdream[ray]"): the
    cluster of RAY_ADDRESS, else one it starts here."""
    publish_every: float = 2.0
    """Of a parallel run: seconds between the weights that actors get."""
    control_rate: float | None = None
    """Actions a second at most, in each environment: while training, a step takes as long as on a robot with this
    control loop (None: as long as it takes)."""
    resume_replay_seconds: float = 120.0
    """Most seconds spent on re-stepping environments at --resume; beyond it new episodes start instead."""

    # -- Replay
    replay_capacity: int = 500_000
    """Steps kept, over all environments (of one process, as the batches are)."""
    prefill: int = 1_024
    """Actions taken, over all environments, before the first update: by V3's actor, which has learned nothing, else at
    random."""
    batch_size: int = 16
    """Sequences of an update; under torchrun, of each process: N processes learn from N * batch_size."""
    batch_length: int = 64
    train_ratio: float = 32.0
    """Replayed steps per environment step (after action repeat). Of a parallel run the least: it learns on while actors
    act, and they wait where they are too far ahead."""
    replay_context: int = 1
    """Steps before every trained sequence: the model goes on from the state stored with the first of them, filters the
    others without gradient, and stores the states of the trained steps anew. 0 starts from the initial state."""
    replay_online: bool = True
    """Train on fresh sequences first, each of them once, before the selector chooses."""
    replay_selector: Literal["uniform", "recency", "prioritized", "curious"] = "uniform"
    """How replayed sequences are chosen; the last two by the world model's loss at every step."""
    replay_prefetch: int | None = None
    """Batches sampled ahead in the background (None: 2 on CUDA, 0 on the CPU). A run that samples ahead does not
    continue bit for bit after --resume: the batches under way are lost."""

    # -- Model
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"
    """Size preset of DreamerV3; the sizes below override it one by one."""
    cell: Literal["gru", "layernorm_gru", "block_gru"] = "block_gru"
    deter_size: int | None = None
    hidden_size: int | None = None
    stoch_size: int = 32
    classes: int | None = None
    """Classes per categorical latent; 0 for Gaussian latents."""
    blocks: int = 8
    """Blocks of the block-diagonal GRU."""
    unimix: float = 0.01
    """Share of the uniform distribution mixed into latents and discrete policies."""
    initial: Literal["zeros", "learned"] = "zeros"
    embed_size: int | None = None
    """Width the encoder's output is projected to (None: as it comes)."""
    depth: int | None = None
    """Base width of the convolutions."""
    depth_mults: tuple[int, ...] = (2, 3, 4, 4)
    """Width of each convolution stage, in units of `depth`."""
    image_bits: int = 8
    """Bits of pictures that PlaNet sees; noise takes the place of those below."""
    residual_blocks: int = 0
    """Residual blocks after each convolution stage."""
    units: int | None = None
    """Width of the vector encoder, vector decoder and heads."""
    encoder_layers: int = 3
    decoder_layers: int = 3
    reward_layers: int = 1
    continue_layers: int = 1
    actor_layers: int = 3
    critic_layers: int = 3
    act: Literal["silu", "elu", "relu", "gelu"] = "silu"
    conv_act: Literal["silu", "elu", "relu", "gelu"] | None = None
    """Of convolutions, other than those of slots (None: `act`)."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """`act` and `norm` are those of encoder, decoder and heads; of V1, V2 and what is built on them, also of the RSSM,
    which elsewhere has those its cell was published with."""

    # -- Slots: pictures as entities (PhyXDreamer)
    slot_mode: Literal["embed", "per_slot"] | None = None
    """How slot attention enters the world model: `embed`, ordered slots are the RSSM's embedding; `per_slot`, every
    slot has an RSSM of its own with shared weights. None: no slots; pictures are encoded as a whole."""
    slots: int = 7
    """Slots per picture."""
    slot_size: int = 64
    """Size of a slot, of tokens, queries, keys and values."""
    slot_iterations: int = 3
    """How often slots attend."""
    slot_initial: Literal["learned", "gaussian"] = "learned"
    """Where slots start: at learned vectors, so that their order means the same in every episode; or drawn once for
    each episode from a learned normal distribution."""
    slot_recurrent: bool = False
    """Slots of a frame start from those of the frame before, which takes one call of slot attention per frame, instead
    of from where the episode's first frame started."""
    slot_predictor: bool = False
    """A transformer block over the slots between frames; needs `slot_recurrent`."""
    slot_depth: int = 32
    """Channels of the slot encoder's convolutions."""
    slot_layers: int = 4
    """Number of the slot encoder's convolutions."""
    slot_stride: int = 1
    """Stride of the first of them: 2 makes the slot encoder about four times cheaper."""
    slot_decoder_size: int = 64
    """Width of the slot decoder."""
    slot_decoder_layers: int = 2
    slot_patch: int = 4
    """Side in pixels of the patches that slots are painted in."""
    slot_coeff: float = 1.0
    """Weight of the pictures painted from the encoder's own slots, which teach it objects without the RSSM between."""
    slot_message_size: int = 64
    """Size of the messages between the RSSMs of `per_slot`, made by self-attention before each step: a multiple of 4,
    its heads. 0: slots know nothing of each other, and the scan over time is one fused call."""

    # -- World model without reconstruction (V1, V2, Dreaming, DreamingV2)
    representation: Literal["reconstruction", "contrastive", "reward_only"] = "reconstruction"
    """What states learn of observations, beside the reward: to reconstruct them (not for Dreaming); to tell them from
    all others of the batch; or nothing. Decoders of the last two learn apart, without a say in what states hold."""
    contrastive_critic: Literal["gaussian", "bilinear", "cosine"] = "gaussian"
    """How well a state fits an observation, see `nn.Contrast`. Papers write a density; `gaussian` is one."""
    contrastive_coeff: float = 1.0
    crop_pixels: int = 0
    """How far Dreaming's random crops are moved, in each direction; vectors have none. Choose what hides nothing that
    matters: 4 of 72 in the papers, 1 or 2 of 32, 0 for pictures like those of Catch, which are 10x5."""
    crop_padding: bool = True
    """Crops are as large as pictures, the edges of which are repeated outwards. The papers' are smaller: with False,
    `image_size` 72 and `crop_pixels` 4, they are 64x64 of 72x72."""
    crop_shared: bool = True
    """One crop for all steps of a sequence. As in acting, nothing then moves that does not move; with False it does."""

    # -- World model loss
    reconstruction_coeff: float = 1.0
    l1_coeff: float = 0.0
    """λ of the absolute error that is added to the squared error of pictures, for sharper texture. docs/results has
    what it does to sharpness, and why presets of hands take 0.3."""
    reward_coeff: float = 1.0
    clip_rewards: Literal["tanh", "sign"] | None = None
    """What learning makes of rewards; returns are logged as they are."""
    continue_coeff: float = 1.0
    kl_loss_coeff: float = 1.0
    """Scale of both KL terms."""
    dynamics_coeff: float = 1.0
    """Weight of KL(sg(posterior) ‖ prior)."""
    representation_coeff: float = 0.1
    """Weight of KL(posterior ‖ sg(prior))."""
    free_nats: float = 1.0
    overshooting: int = 0
    """Of PlaNet and Dreaming: the prior is compared with what came up to so many steps later than the next, too. 0 in
    PlaNet, where an RSSM gained little by it; in Dreaming the linear dynamics look as far."""
    overshooting_coeff: float = 1.0
    """Weight of PlaNet's mean over these distances."""

    # -- Behaviour
    behaviour: Literal["actor_critic", "planner"] | None = None
    """Of dreamer_v3, with slots or without: learn an actor and a critic in imagination, or only the world model, and
    plan (None: plan where the agent is planet, else learn)."""
    plan_horizon: int = 12
    """Actions that a planner looks ahead."""
    plan_candidates: int = 1000
    """Plans tried for each environment at an iteration of the cross-entropy method."""
    plan_iterations: int = 10
    plan_elites: int = 100
    """Candidates that the next iteration's are drawn around."""
    plan_noise: Literal["common", "own"] = "common"
    """Of imagined states: common to all candidates of an environment, which then differ by their actions alone; or each
    candidate's own, as PlaNet has it. One CartpoleBalance agent earned 917 by the first and 821 by the second."""
    imagine_horizon: int = 15
    imagine_last: int | None = None
    """Imagination starts at the last so many steps of every replayed sequence (None: at all of them)."""
    discount: float = 1 - 1 / 333
    td_lambda: float = 0.95
    entropy_coeff: float = 3e-4
    """Weight of the policy's entropy, of V2 and V3."""
    actor_dist: Literal["categorical", "bounded_normal", "tanh_normal"] | None = None
    """None: categorical for discrete actions; for continuous ones bounded_normal, of V1 tanh_normal."""
    actor_gradient: Literal["reinforce", "dynamics", "both"] | None = None
    """How V2's actor learns (None: reinforce for discrete actions, dynamics for continuous ones)."""
    actor_mix: float = 0.1
    """Share of the gradient through the dynamics in `both`; the rest is reinforce."""
    exploration_noise: float = 0.0
    """Of V1, V2, World Models and planners: standard deviation of what is added to continuous actions, share of
    discrete ones drawn anew."""
    return_norm_rate: float = 0.01
    """Rate of the moving 5th and 95th return percentiles that scale advantages; of their moving standard deviation in
    DayDreamer."""
    slow_critic_rate: float = 0.02
    """Rate of the moving average that V3's slow critic is."""
    slow_critic_every: int = 100
    """Updates between copies of V2's critic to its slow one."""
    slow_critic_coeff: float = 1.0
    """Weight of V3's critic's regression towards its own moving average."""
    replay_critic_coeff: float = 0.3
    """Weight of V3's critic's loss on replayed trajectories."""

    # -- World Models: a controller that is evolved in dreams
    mixtures: int = 5
    """Normals that the memory mixes for each dimension of z."""
    population: int = 64
    """Controllers of a generation."""
    dreams: int = 16
    """Dreams that each of them is judged by."""
    dream_start: Literal["episode", "anywhere"] = "episode"
    """Where dreams start: where replayed episodes do, as the paper's, or at any step of a batch. With "episode", a
    generation that is due waits for a batch in which one starts (behind the first step, which always seems to)."""
    dream_temperature: float = 1.0
    """How uncertain dreams are: above 1 they are harder to exploit than the memory believes them to be."""
    evolve_after: int = 1_000
    """Updates of vision and memory before the first generation, until when actions are random."""
    evolve_every: int = 10
    """Updates between generations."""
    cma_sigma: float = 0.1
    """Standard deviation of the first generation's weights."""

    # -- Optimiser (V3: LaProp after adaptive gradient clipping; V1 and V2: Adam after clipping of norms)
    learning_rate: float = 4e-5
    """Of everything in V3, of the world model in V1, V2, PlaNet and World Models."""
    actor_learning_rate: float | None = None
    """Of V1 and V2 (None: as the world model's)."""
    critic_learning_rate: float | None = None
    """Of V1 and V2 (None: as the world model's)."""
    grad_clip: float = 100.0
    """Largest norm of the gradients of world model, actor and critic each, of V1, V2 and PlaNet; of vision and memory
    each, of World Models."""
    weight_decay: float = 0.0
    """Share that matrices lose at each update of V1 and V2."""
    agc: float = 0.3
    """Largest gradient norm, as a share of each weight's norm."""
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-20
    warmup: int = 1_000
    """Updates over which V3's learning rate rises linearly."""

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def env_id(self) -> str:
        """The environment with its backend: "envpool:Catch-v0"."""
        if ":" in self.env:
            return self.env
        return f"{'unity' if self.env_backend == 'unity_mlagents' else self.env_backend}:{self.env}"

    @property
    def env_arguments(self) -> dict[str, Any]:
        """`env_options` by name, their values as JSON or Python writes them, or else text."""
        found: dict[str, Any] = {}
        for option in self.env_options:
            name, _, value = option.partition("=")
            found[name] = value
            for read in (json.loads, ast.literal_eval):
                with contextlib.suppress(ValueError, SyntaxError, TypeError):
                    found[name] = read(value)
                    break
        return found

    def resolve(self) -> DreamerConfig:
        """A copy with every None that has a rule filled in, checked; raises `ConfigError` naming what is wrong."""
        unknown = set(vars(self)) - {f.name for f in fields(self)}
        for name in sorted(unknown):
            raise ConfigError(f"unknown option {name!r}{suggest(name, [f.name for f in fields(self)])}")
        if self.size not in SIZES:
            raise ConfigError(f"size: expected one of {list(SIZES)}, got {self.size!r}")
        rules = SIZES[self.size] | dict(behaviour="planner" if self.agent == "planet" else "actor_critic")
        filled = {name: value for name, value in rules.items() if getattr(self, name) is None}
        resolved = replace(self, **filled)
        resolved._check()
        return resolved

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DreamerConfig:
        """The inverse of `to_dict`, after a trip through JSON; unknown names raise `ConfigError`."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{suggest(name, known)}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)

    def _check(self) -> None:
        at_least = dict(
            num_envs=1, action_repeat=1, time_limit=1, image_size=5, total_steps=1, log_every=1, eval_every=0,
            eval_episodes=1, checkpoint_every=0, resume_replay_seconds=0, replay_capacity=1, prefill=0, batch_size=1,
            batch_length=2, replay_context=0, replay_prefetch=0, deter_size=1, hidden_size=1, stoch_size=1, classes=0,
            blocks=1, embed_size=1, depth=1, residual_blocks=0, units=1, encoder_layers=1, decoder_layers=1,
            reward_layers=1, continue_layers=1, actor_layers=1, critic_layers=1, reconstruction_coeff=0, reward_coeff=0,
            continue_coeff=0, kl_loss_coeff=0, dynamics_coeff=0, representation_coeff=0, free_nats=0, imagine_horizon=1,
            imagine_last=2, entropy_coeff=0, slow_critic_coeff=0, replay_critic_coeff=0, adam_eps=0, warmup=0, seed=0,
            slots=1, slot_size=1, slot_iterations=1, slot_depth=1, slot_layers=1, slot_stride=1, slot_decoder_size=1,
            slot_decoder_layers=1, slot_patch=1, slot_message_size=0, slot_coeff=0,
            l1_coeff=0, exploration_noise=0, slow_critic_every=1, weight_decay=0,
            image_bits=1, overshooting=0, overshooting_coeff=0, plan_horizon=1, plan_candidates=1, plan_iterations=1,
            plan_elites=1,
            mixtures=1, population=4, dreams=1, evolve_after=0, evolve_every=1,
            contrastive_coeff=0, crop_pixels=0, actors=1, publish_every=0,
        )  # fmt: skip
        kinds = {f.name: str(f.type) for f in fields(self)}
        for name, low in at_least.items():
            value, kind = getattr(self, name), "integer" if kinds[name].startswith("int") else "number"
            fits = _is_number(value) and value >= low and (kind == "number" or isinstance(value, int))
            if not fits and not (value is None and "None" in kinds[name]):
                raise ConfigError(f"{name}: expected {'an' if kind == 'integer' else 'a'} {kind} of at least {low}, "
                                  f"got {value!r}")  # fmt: skip
        for name in ("train_ratio", "learning_rate", "agc", "actor_learning_rate", "critic_learning_rate", "grad_clip",
                     "dream_temperature", "cma_sigma", "control_rate"):  # fmt: skip
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and not (value is None and "None" in kinds[name]):
                raise ConfigError(f"{name}: expected a positive number, got {value!r}")
        for name in ("discount", "td_lambda", "slow_critic_rate", "actor_mix"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value <= 1):
                raise ConfigError(f"{name}: expected a number in [0, 1], got {value!r}")
        for name in ("unimix", "beta1", "beta2"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise ConfigError(f"{name}: expected a number in [0, 1), got {value!r}")
        if not (_is_number(self.return_norm_rate) and 0 < self.return_norm_rate <= 1):
            raise ConfigError(f"return_norm_rate: expected a number in (0, 1], got {self.return_norm_rate!r}")
        choices = dict(
            env_backend=("envpool", "gym", "dmc", "robotics", "unity_mlagents"),
            cell=("gru", "layernorm_gru", "block_gru"), initial=("zeros", "learned"), norm=("rms", "layer", "none"),
            act=("silu", "elu", "relu", "gelu"), conv_act=(None, "silu", "elu", "relu", "gelu"),
            clip_rewards=(None, "tanh", "sign"), replay_selector=("uniform", "recency", "prioritized", "curious"),
            actor_dist=(None, "categorical", "bounded_normal", "tanh_normal"),
            agent=("dreamer_v1", "dreamer_v2", "dreamer_v3", "planet", "dreaming", "dreaming_v2", "daydreamer",
                   "world_models"),
            actor_gradient=(None, "reinforce", "dynamics", "both"), dream_start=("episode", "anywhere"),
            actor_backend=("process", "ray"),
            slot_mode=(None, "embed", "per_slot"), slot_initial=("learned", "gaussian"),
            behaviour=("actor_critic", "planner"), plan_noise=("common", "own"),
            representation=("reconstruction", "contrastive", "reward_only"),
            contrastive_critic=("gaussian", "bilinear", "cosine"),
        )  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                known = [k for k in known if k]
                raise ConfigError(f"{name}: expected one of {known}, got {value!r}{suggest(str(value), known)}")
        if self.cell == "block_gru" and self.deter_size % self.blocks:
            raise ConfigError(f"deter_size: must be divisible by blocks={self.blocks}, got {self.deter_size}")
        if self.actors > 1 and not self.parallel:
            raise ConfigError(f"actors: expected 1 without parallel, got {self.actors}")
        smallest = self.actors * self.num_envs * (self.batch_length + self.replay_context)
        if self.replay_capacity < smallest:
            raise ConfigError(
                f"replay_capacity: expected at least {'actors*' * (self.actors > 1)}num_envs*(batch_length + "
                f"replay_context) = {smallest} steps, got {self.replay_capacity}"
            )
        if self.imagine_last is not None and self.imagine_last > self.batch_length:
            raise ConfigError(
                f"imagine_last: expected at most batch_length = {self.batch_length} steps, got {self.imagine_last}"
            )
        if self.imagine_horizon < 2 and self.agent not in ("dreamer_v3", "planet", "world_models"):
            raise ConfigError(f"imagine_horizon: agent {self.agent!r} needs at least 2 steps, got "
                              f"{self.imagine_horizon}")  # fmt: skip
        representations = REPRESENTATIONS.get(self.agent, ("reconstruction",))
        if self.representation not in representations:
            raise ConfigError(f"representation: expected one of {list(representations)} for agent {self.agent!r}, got "
                              f"{self.representation!r}")  # fmt: skip
        if self.slot_message_size % SLOT_HEADS:
            raise ConfigError(f"slot_message_size: expected a multiple of {SLOT_HEADS}, got {self.slot_message_size}")
        if self.slot_mode and self.agent != "dreamer_v3":
            raise ConfigError(f"slot_mode: needs agent 'dreamer_v3', got {self.agent!r}")
        can = {"planet": ("planner",), "dreamer_v3": ("actor_critic", "planner")}.get(self.agent, ("actor_critic",))
        if self.behaviour not in can:
            raise ConfigError(f"behaviour: agent {self.agent!r} takes {' or '.join(map(repr, can))}, got "
                              f"{self.behaviour!r}")  # fmt: skip
        if self.plan_elites > self.plan_candidates:
            raise ConfigError(f"plan_elites: expected at most plan_candidates = {self.plan_candidates}, got "
                              f"{self.plan_elites}")  # fmt: skip
        if self.image_bits > 8:
            raise ConfigError(f"image_bits: expected at most 8, got {self.image_bits}")
        if self.overshooting > self.batch_length - 2:
            raise ConfigError(f"overshooting: expected at most batch_length - 2 = {self.batch_length - 2} steps, got "
                              f"{self.overshooting}")  # fmt: skip
        if self.slot_predictor and not self.slot_recurrent:
            raise ConfigError("slot_predictor: needs slot_recurrent, got True without it")
        if self.slot_predictor and self.slot_size % SLOT_HEADS:
            raise ConfigError(f"slot_size: slot_predictor needs a multiple of {SLOT_HEADS}, got {self.slot_size}")
        if self.agent == "world_models":
            if self.classes:
                raise ConfigError(f"classes: agent 'world_models' has Gaussian latents, expected 0, got {self.classes}")
            if self.actor_dist is not None:
                raise ConfigError(f"actor_dist: agent 'world_models' has a linear controller, expected None, got "
                                  f"{self.actor_dist!r}")  # fmt: skip
        for option in self.env_options:
            name, equals, _ = option.partition("=")
            if not equals or not name.isidentifier():
                raise ConfigError(f"env_options: expected NAME=VALUE, got {option!r}")
            if name in _ENV_ARGUMENTS:
                raise ConfigError(f"env_options: {name} is no option of the environment's own, got {option!r}")
        if len(self.env_arguments) < len(self.env_options):
            raise ConfigError(f"env_options: expected each option once, got {' '.join(self.env_options)}")
        if not self.depth_mults or not all(isinstance(m, int) and m >= 1 for m in self.depth_mults):
            raise ConfigError(f"depth_mults: expected positive integers, got {self.depth_mults}")


_ENV_ARGUMENTS = ("id", "num_envs", "seed", "action_repeat", "time_limit", "image_size", "pixels", "camera",
                  "segmentation")  # fmt: skip
SLOT_HEADS = 4  # of self-attention among slots
REPRESENTATIONS = {
    "dreamer_v1": ("reconstruction", "contrastive", "reward_only"),
    "dreamer_v2": ("reconstruction", "contrastive", "reward_only"),
    "dreaming": ("contrastive", "reward_only"),
    "dreaming_v2": ("contrastive", "reward_only"),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _size(deter: int, hidden: int, classes: int) -> dict[str, int]:
    return dict(deter_size=deter, hidden_size=hidden, classes=classes, units=hidden, depth=hidden // 16)


SIZES = {
    "1m": _size(512, 64, 4),
    "12m": _size(2048, 256, 16),
    "25m": _size(3072, 384, 24),
    "50m": _size(4096, 512, 32),
    "100m": _size(6144, 768, 48),
    "200m": _size(8192, 1024, 64),
    "400m": _size(12288, 1536, 96),
}
"""Sizes of DreamerV3 (danijar/dreamerv3 configs.yaml)."""

# Slots on moving sprites, sized for two CPU cores; `--slot-mode per_slot` for a state of each slot. There is nothing to
# learn until slots have found the disc, which takes many gradient steps on pictures that differ: short sequences from
# many episodes. The plans and the noise are those of `--behaviour planner`: half the longest way is far enough ahead
# where every step pays.
_PHYXDREAM: dict[str, Any] = dict(
    env_backend="gym", env="phyxdream/Sprites-v0", total_steps=12_000, size="1m", slot_mode="embed", slots=4,
    slot_iterations=2, slot_stride=4, slot_layers=2, slot_patch=8, slot_coeff=5.0, reconstruction_coeff=5.0,
    deter_size=128, stoch_size=16, classes=8, batch_length=4, train_ratio=32.0, imagine_horizon=10,
    learning_rate=2e-3, warmup=100, actor_layers=2, critic_layers=2, discount=0.95, entropy_coeff=3e-3,
    log_every=400, eval_episodes=50, replay_capacity=100_000,
    plan_horizon=6, plan_candidates=64, plan_iterations=4, plan_elites=8, exploration_noise=0.3,
)  # fmt: skip
# A hand in pictures: sized for a GPU, though a CPU runs it too.
_HAND: dict[str, Any] = dict(
    pixels=True, image_size=64, slot_mode="embed", slots=7, slot_stride=2, slot_layers=3, l1_coeff=0.3,
    deter_size=1024, batch_length=32, learning_rate=1e-4, discount=0.99, replay_capacity=200_000,
)  # fmt: skip

# The literature's settings, with what a CPU can do in the place of pictures of 64x64.
_V1: dict[str, Any] = dict(
    agent="dreamer_v1", env="CartpoleBalance-v1", num_envs=1, action_repeat=2, total_steps=100_000,
    cell="gru", deter_size=200, hidden_size=200, stoch_size=30, classes=0, unimix=0.0, embed_size=1024,
    units=400, depth=32, depth_mults=(1, 2, 4, 8), act="elu", conv_act="relu", norm="none",
    encoder_layers=3, decoder_layers=3, reward_layers=2, continue_layers=3, critic_layers=3, actor_layers=4,
    reconstruction_coeff=0.5, continue_coeff=0.0, dynamics_coeff=1.0, representation_coeff=1.0, free_nats=3.0,
    discount=0.99, entropy_coeff=0.0, exploration_noise=0.3,
    batch_size=50, batch_length=50, replay_context=0, replay_online=False, prefill=2500, train_ratio=500.0,
    learning_rate=6e-4, actor_learning_rate=8e-5, critic_learning_rate=8e-5, adam_eps=1e-7,
)  # fmt: skip
_PLANET: dict[str, Any] = _V1 | dict(
    agent="planet", action_repeat=8, act="relu", conv_act=None, units=300, reward_layers=3, reward_coeff=10.0,
    discount=1.0, image_bits=5, plan_noise="own", prefill=625, train_ratio=2000.0, learning_rate=1e-3, adam_eps=1e-4,
    grad_clip=1000.0,
)  # fmt: skip
_V2: dict[str, Any] = _V1 | dict(
    agent="dreamer_v2", cell="layernorm_gru", stoch_size=32, classes=32, conv_act=None,
    encoder_layers=4, decoder_layers=4, reward_layers=4, continue_layers=4, critic_layers=4,
    dynamics_coeff=0.8, representation_coeff=0.2, free_nats=1.0,
    entropy_coeff=1e-4, exploration_noise=0.0, batch_size=16, train_ratio=160.0, learning_rate=3e-4, adam_eps=1e-5,
    weight_decay=1e-6, prefill=1000,
)  # fmt: skip
# The paper's car. Dreams start where its episodes do, but are not as long: few skills need a thousand steps to show.
_WORLD_MODELS: dict[str, Any] = dict(
    agent="world_models", env="CarRacing-v3", image_size=64, num_envs=8,
    deter_size=256, stoch_size=32, classes=0, units=256, depth=32, depth_mults=(1, 2, 4, 8), act="relu", norm="none",
    encoder_layers=2, decoder_layers=2, representation_coeff=1.0, free_nats=0.0,
    imagine_horizon=100, discount=1.0, exploration_noise=0.1,
    batch_size=16, batch_length=32, replay_context=0, replay_online=False, prefill=10_000, train_ratio=32.0,
    learning_rate=1e-3, adam_eps=1e-8, replay_capacity=200_000,
)  # fmt: skip
# Pictures of 72x72, of which 64x64 are seen.
_DREAMING: dict[str, Any] = dict(
    env_backend="dmc", env="reacher_hard", pixels=True, image_size=72, crop_pixels=4, crop_padding=False,
    representation="contrastive", overshooting=3,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "dreamer_v3": {},
    "dreamer_v2": _V2,
    # Discrete actions and episodes that end.
    "dreamer_v2_atari": _V2 | dict(
        env="Pong-v5", num_envs=8, action_repeat=1, env_options=("repeat_action_probability=0.25",),
        clip_rewards="tanh", deter_size=600, hidden_size=600, kl_loss_coeff=0.1, free_nats=0.0, continue_coeff=5.0,
        discount=0.999, entropy_coeff=1e-3, learning_rate=2e-4, actor_learning_rate=4e-5, critic_learning_rate=1e-4,
        prefill=50_000, train_ratio=50.0, total_steps=50_000_000,
    ),
    "dreamer_v1": _V1,
    "planet": _PLANET,
    "world_models": _WORLD_MODELS,
    "dreaming": _V1 | _DREAMING | dict(agent="dreaming"),
    "dreaming_v2": _V2 | _DREAMING | dict(agent="dreaming_v2"),
    # Robots: the learner never rests, and a robot waits only for one that is far too slow.
    "daydreamer": _V2 | dict(
        agent="daydreamer", parallel=True, action_repeat=1, deter_size=512, hidden_size=512, units=512, depth=64,
        norm="layer", unimix=0.01, initial="learned", continue_coeff=1.0, discount=0.995, entropy_coeff=3e-3,
        batch_size=32, batch_length=32, learning_rate=1e-4, actor_learning_rate=1e-4, critic_learning_rate=1e-4,
        adam_eps=1e-6, prefill=2000, train_ratio=64.0,
    ),
    # What bare `phyxdream train` runs: 10x5 pictures, episodes of nine steps, minutes on two CPU cores.
    "catch": dict(
        env="Catch-v0", total_steps=16_000, size="1m", deter_size=128, stoch_size=16, classes=8, batch_size=32,
        batch_length=12, train_ratio=64.0, imagine_horizon=9, learning_rate=1e-3, warmup=100, discount=0.95,
        entropy_coeff=3e-3, actor_layers=2, critic_layers=2, log_every=500, eval_episodes=100,
        replay_capacity=100_000, checkpoint_every=60.0,
    ),
    "phyxdream": _PHYXDREAM,
    "phyxdream-hand": _HAND | dict(env_backend="envpool", env="HandManipulateBlockRotateZDense-v1"),
    "phyxdream-hand-touch": _HAND
    | dict(env_backend="robotics", env="HandManipulateBlockRotateZ_BooleanTouchSensorsDense-v1"),
    "phyxdream-leap": _HAND | dict(env_backend="envpool", env="LeapCubeReorient-v1"),
}  # fmt: skip


def preset(name: str, **overrides: Any) -> DreamerConfig:
    """The configuration of preset `name` with `overrides`; unknown names raise `ConfigError` with the nearest."""
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}{suggest(name, PRESETS)}")
    return DreamerConfig.from_dict({**PRESETS[name], "preset": name, **overrides})
