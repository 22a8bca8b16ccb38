// Every op or component adds its functions to the module here; bindings.cpp calls them all.
#pragma once
#include <pybind11/pybind11.h>

namespace phyx {
void bind_balanced_kl(pybind11::module_& module);
void bind_lambda_return(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_matmul(pybind11::module_& module);
void bind_rms_norm_silu(pybind11::module_& module);
void bind_rssm_scan(pybind11::module_& module);
void bind_slot_attention(pybind11::module_& module);
void bind_two_hot_loss(pybind11::module_& module);
void bind_replay(pybind11::module_& module);
}  // namespace phyx
