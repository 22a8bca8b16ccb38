"""Which product of which rows is the gradient of which weight of an RSSM cell, whoever wrote the rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from phyxdream.ops.rssm_cells import BlockGRUWeights, CellWeights, GRUWeights


class CellGradients:
    """Rows (T·B, size) that follow a backward scan; those that no wanted weight needs are never asked for.

    Attributes:
        cell: the weights.
        stoch_grad, action_grad: gradients of the layers that z and the action enter, as they leave the norm.
        deter_grad: likewise of h, block_gru.
        in_out: what these layers gave, side by side: of h, z and the action.
        mix_grad, mix_out: of the mix of block_gru.
        gate_grad: gradients of the gates, as they leave the norm; of gru, as `input_gates` knows them.
        hidden_gate_grad: of gru, as `hidden_gates` knows them.
    """

    cell: CellWeights

    @staticmethod
    def product(grad: Tensor, *sources: Tensor) -> Tensor:
        """The gradient (N, sum of sizes) of a map of rows (T·B, size) side by side; `grad` (T·B, N) is that of its
        result."""
        raise NotImplementedError

    @staticmethod
    def block_product(source: Tensor, grad: Tensor, blocks: int) -> Tensor:
        """The gradient (G, I, O) of a block-diagonal map of rows (T·B, G·I); `grad` (T·B, G·O) is of its result."""
        raise NotImplementedError

    @staticmethod
    def summed(grad: Tensor) -> Tensor:
        """The sum (N,) of rows (T·B, N)."""
        raise NotImplementedError

    def makers(self, before: Tensor, action: Tensor) -> dict[str, Callable[[], Tensor]]:
        """By weight what makes its gradient, of all but `in_stoch`, gains and shifts; `before` (T·B, D) are the states
        before, `action` (T·B, A) the actions as their layer read them."""
        found = {"in_action": lambda: self.product(self.action_grad, action)}
        if isinstance(self.cell, BlockGRUWeights):
            blocks = self.cell.mix_deter.shape[0]
            return found | {
                "in_deter": lambda: self.product(self.deter_grad, before),
                "in_deter_bias": lambda: self.summed(self.deter_grad),
                "in_stoch_bias": lambda: self.summed(self.stoch_grad),
                "in_action_bias": lambda: self.summed(self.action_grad),
                "mix_deter": lambda: self.block_product(before, self.mix_grad, blocks),
                "mix_inputs": lambda: self.product(self.mix_grad, self.in_out),
                "mix_bias": lambda: self.summed(self.mix_grad),
                "gates": lambda: self.block_product(self.mix_out, self.gate_grad, blocks),
                "gates_bias": lambda: self.summed(self.gate_grad),
            }
        found["in_bias"] = lambda: self.summed(self.stoch_grad)
        if isinstance(self.cell, GRUWeights):
            return found | {
                "input_gates": lambda: self.product(self.gate_grad, self.in_out),
                "hidden_gates": lambda: self.product(self.hidden_gate_grad, before),
                "input_bias": lambda: self.summed(self.gate_grad),
                "hidden_bias": lambda: self.summed(self.hidden_gate_grad),
            }
        return found | {
            "gates": lambda: self.product(self.gate_grad, self.in_out, before),
            "gates_bias": lambda: self.summed(self.gate_grad),
        }
