#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of phyxdream. Works on raw memory; knows nothing of torch.";
  phyx::bind_balanced_kl(module);
  phyx::bind_lambda_return(module);
  phyx::bind_linear(module);
  phyx::bind_matmul(module);
  phyx::bind_rms_norm_silu(module);
  phyx::bind_rssm_scan(module);
  phyx::bind_slot_attention(module);
  phyx::bind_two_hot_loss(module);
  phyx::bind_replay(module);
}
