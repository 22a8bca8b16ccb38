"""The fused ops: one file per op, each with a readable reference and faster implementations of the same contract."""

from phyxdream.ops.backend import BackendError, explain, use_backend
from phyxdream.ops.balanced_kl import balanced_kl, balanced_kl_gaussian
from phyxdream.ops.lambda_return import lambda_return
from phyxdream.ops.linear import linear
from phyxdream.ops.rms_norm_silu import rms_norm_silu
from phyxdream.ops.rssm_cells import (
    BlockGRUWeights,
    GRUWeights,
    HeadWeights,
    LayerNormGRUWeights,
    LayerWeights,
    PosteriorWeights,
)
from phyxdream.ops.rssm_imagine import rssm_imagine, rssm_imagine_policy
from phyxdream.ops.rssm_observe import rssm_observe
from phyxdream.ops.rssm_step import rssm_imagine_step, rssm_step
from phyxdream.ops.slot_attention import SlotAttentionWeights, slot_attention
from phyxdream.ops.two_hot_loss import two_hot_loss, two_hot_mean

__all__ = [
    "BackendError",
    "BlockGRUWeights",
    "GRUWeights",
    "HeadWeights",
    "LayerNormGRUWeights",
    "LayerWeights",
    "PosteriorWeights",
    "SlotAttentionWeights",
    "balanced_kl",
    "balanced_kl_gaussian",
    "explain",
    "lambda_return",
    "linear",
    "rms_norm_silu",
    "rssm_imagine",
    "rssm_imagine_policy",
    "rssm_imagine_step",
    "rssm_observe",
    "rssm_step",
    "slot_attention",
    "two_hot_loss",
    "two_hot_mean",
    "use_backend",
]
