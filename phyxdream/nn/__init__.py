"""Modules built on the ops: the RSSM, slot attention, encoders and decoders, heads and distributions."""

from phyxdream.nn.contrastive import Contrast
from phyxdream.nn.crops import Crops
from phyxdream.nn.distributions import (
    Bernoulli,
    GaussianMixture,
    Normal,
    OneHotCategorical,
    SlotMixture,
    SquaredError,
    TanhNormal,
    TwoHotSymlog,
    balanced_kl,
    kl_divergence,
    symexp_bins,
)
from phyxdream.nn.heads import Actor, BernoulliHead, ScalarHead, SlotHead, TwoHotHead
from phyxdream.nn.layers import MLP, BlockLinear, Dense, symexp, symlog
from phyxdream.nn.mdn_lstm import MDNLSTM
from phyxdream.nn.rssm import RSSM, State, Trajectory
from phyxdream.nn.slot_rssm import SlotRSSM
from phyxdream.nn.slot_vision import SlotAutoencoder, SlotDecoder, SlotEncoder, SlotPicture, SlotTokens, SoftPosition
from phyxdream.nn.slots import SlotAttention, SlotTransformer
from phyxdream.nn.vision import Decoder, Encoder, ImageDecoder, ImageEncoder

__all__ = [
    "MDNLSTM", "MLP", "RSSM", "Actor", "Bernoulli", "BernoulliHead", "BlockLinear", "Contrast", "Crops", "Decoder",
    "Dense", "Encoder", "GaussianMixture", "ImageDecoder", "ImageEncoder", "Normal", "OneHotCategorical",
    "ScalarHead", "SlotAttention",
    "SlotAutoencoder", "SlotDecoder", "SlotEncoder", "SlotHead", "SlotMixture", "SlotPicture", "SlotRSSM", "SlotTokens",
    "SlotTransformer", "SoftPosition", "SquaredError", "State", "TanhNormal", "Trajectory", "TwoHotHead",
    "TwoHotSymlog", "balanced_kl", "kl_divergence", "symexp", "symexp_bins", "symlog",
]  # fmt: skip
