"""The fused ops: one file per op, each with a readable reference and faster implementations of the same contract."""

from phyxdream.ops.backend import BackendError, explain, use_backend
from phyxdream.ops.lambda_return import lambda_return
from phyxdream.ops.rms_norm_silu import rms_norm_silu

__all__ = ["BackendError", "explain", "lambda_return", "rms_norm_silu", "use_backend"]
