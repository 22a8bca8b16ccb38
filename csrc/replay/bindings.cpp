// phyxdream._C.ReplayBuffer: what phyxdream/replay.py calls. The GIL is released around all work on the buffer.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "replay/buffer.h"

namespace py = pybind11;

namespace phyx {
namespace {

using replay::Buffer;
using replay::Field;

using Spec = std::vector<std::tuple<std::string, std::vector<std::int64_t>, std::string>>;

std::unique_ptr<Buffer> make_buffer(const Spec& spec, std::size_t capacity, std::size_t num_envs, std::uint64_t seed) {
  if (num_envs > Buffer::kMaxEnvs)
    throw std::invalid_argument("num_envs: got " + std::to_string(num_envs) + ", expected at most " +
                                std::to_string(Buffer::kMaxEnvs));
  std::vector<Field> fields;
  for (const auto& [name, shape, dtype] : spec) {
    std::size_t code = 0;
    while (code < replay::kNumDTypes && dtype != replay::kDTypes[code].name) ++code;
    if (code == replay::kNumDTypes) {
      std::string known;
      for (const replay::DType& entry : replay::kDTypes) known += std::string(known.empty() ? "" : ", ") + entry.name;
      throw std::invalid_argument("spec: key '" + name + "' has dtype " + dtype + ", expected one of " + known);
    }
    fields.push_back({name, code, shape});
  }
  return std::make_unique<Buffer>(std::move(fields), capacity, num_envs, seed);
}

Spec spec_of(const Buffer& buffer) {
  Spec spec;
  for (const Field& field : buffer.fields()) spec.emplace_back(field.name, field.shape, field.dtype().name);
  return spec;
}

bool is_native(const py::dtype& dtype) { return dtype.byteorder() == '=' || dtype.byteorder() == '|'; }

// The memory of `value` if it is a C-contiguous (count, *shape) array of the field's dtype, else null.
const std::byte* stored_form(PyObject* value, const Field& field, py::ssize_t count) {
  if (value == nullptr || !py::isinstance<py::array>(value)) return nullptr;
  const auto array = py::reinterpret_borrow<py::array>(value);
  const py::dtype dtype = array.dtype();
  if (dtype.kind() != field.dtype().kind || std::size_t(dtype.itemsize()) != field.dtype().bytes || !is_native(dtype))
    return nullptr;
  if (!(array.flags() & py::array::c_style) || std::size_t(array.ndim()) != field.shape.size() + 1 ||
      array.shape(0) != count || !std::equal(field.shape.begin(), field.shape.end(), array.shape() + 1))
    return nullptr;
  return static_cast<const std::byte*>(array.data());
}

// The env ids as a list, if they are None or a native contiguous 1-D int32 or int64 array.
std::optional<std::vector<std::int64_t>> ids_of(const py::object& env_ids, std::size_t num_envs) {
  std::vector<std::int64_t> ids;
  if (env_ids.is_none()) {
    for (std::size_t env = 0; env < num_envs; ++env) ids.push_back(std::int64_t(env));
    return ids;
  }
  if (!py::isinstance<py::array>(env_ids)) return std::nullopt;
  const auto array = py::reinterpret_borrow<py::array>(env_ids);
  const py::dtype dtype = array.dtype();
  if (array.ndim() != 1 || dtype.kind() != 'i' || !is_native(dtype) || !(array.flags() & py::array::c_style))
    return std::nullopt;
  if (dtype.itemsize() == 4) {
    auto* data = static_cast<const std::int32_t*>(array.data());
    ids.assign(data, data + array.size());
  } else if (dtype.itemsize() == 8) {
    auto* data = static_cast<const std::int64_t*>(array.data());
    ids.assign(data, data + array.size());
  } else {
    return std::nullopt;
  }
  return ids;
}

// False, with nothing stored, when the step is not in the stored form yet: then Python converts it or says what is
// wrong with it. A step that needs no conversion costs this one call.
bool add(Buffer& buffer, const py::object& step, const py::object& env_ids) {
  const auto& fields = buffer.fields();
  if (!PyDict_CheckExact(step.ptr()) || std::size_t(PyDict_Size(step.ptr())) != fields.size()) return false;
  const auto ids = ids_of(env_ids, buffer.num_envs());
  if (!ids) return false;
  std::vector<py::object> alive;  // another thread may change the dict while the GIL is released
  std::vector<const std::byte*> columns;
  for (const Field& field : fields) {
    PyObject* value = PyDict_GetItemString(step.ptr(), field.name.c_str());
    const std::byte* data = stored_form(value, field, py::ssize_t(ids->size()));
    if (data == nullptr) return false;
    alive.push_back(py::reinterpret_borrow<py::object>(value));
    columns.push_back(data);
  }
  const py::gil_scoped_release released;
  buffer.add(ids->data(), ids->size(), columns.data());
  return true;
}

// `outputs` and `step_ids` are addresses of memory of the right size: the caller's tensors.
void sample(Buffer& buffer, std::size_t batch, std::size_t length, const std::vector<std::uintptr_t>& outputs,
            std::uintptr_t step_ids) {
  if (outputs.size() != buffer.fields().size()) throw std::invalid_argument("outputs: expected one for every key");
  const py::gil_scoped_release released;
  std::vector<std::byte*> targets;
  for (const std::uintptr_t address : outputs) targets.push_back(reinterpret_cast<std::byte*>(address));
  buffer.sample(batch, length, targets.data(), reinterpret_cast<std::int64_t*>(step_ids));
}

}  // namespace

void bind_replay(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::register_exception<replay::SnapshotError>(module, "ReplaySnapshotError", PyExc_RuntimeError);
  py::class_<Buffer>(module, "ReplayBuffer")
      .def(py::init(&make_buffer), py::arg("spec"), py::arg("capacity"), py::arg("num_envs"), py::arg("seed"))
      .def("add", &add, py::arg("step"), py::arg("env_ids"))
      .def("sample", &sample, py::arg("batch"), py::arg("length"), py::arg("outputs"), py::arg("step_ids"))
      .def("num_sequences", &Buffer::num_sequences, py::arg("length"), Released())
      .def("save", &Buffer::save, py::arg("path"), Released())
      .def_static("load", &Buffer::load, py::arg("path"), Released())
      .def_property_readonly("size", py::cpp_function(&Buffer::size, Released()))
      .def_property_readonly("total_added", py::cpp_function(&Buffer::total_added, Released()))
      .def_property_readonly("capacity", &Buffer::capacity)
      .def_property_readonly("num_envs", &Buffer::num_envs)
      .def_property_readonly("step_bytes", &Buffer::step_bytes)
      .def_property_readonly("spec", &spec_of);
}

}  // namespace phyx
