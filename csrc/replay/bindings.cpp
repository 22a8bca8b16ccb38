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
#include <type_traits>
#include <utility>
#include <vector>

#include "replay/buffer.h"
#include "replay/loader.h"

namespace py = pybind11;

namespace phyx {
namespace {

using replay::Buffer;
using replay::Field;
using replay::Loader;

// key, shape, dtype, whether it is a latent
using Spec = std::vector<std::tuple<std::string, std::vector<std::int64_t>, std::string, bool>>;

unsigned long main_thread = 0;

// Python's signal handlers run while the main thread waits in C++, so Ctrl-C ends the wait. Other threads have nothing to
// ask for, and must not ask while the interpreter is shutting down.
void poll_signals() {
  if (PyThread_get_thread_ident() != main_thread) return;
  const py::gil_scoped_acquire acquired;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

replay::SelectorConfig selector_of(const py::dict& options) {
  replay::SelectorConfig selector;
  const auto set = [&](const char* name, auto& value) {
    if (options.contains(name)) value = options[name].cast<std::decay_t<decltype(value)>>();
  };
  set("uniform", selector.uniform);
  set("recency", selector.recency);
  set("priority", selector.priority);
  set("recency_exponent", selector.recency_exponent);
  set("curious", selector.curious);
  set("exponent", selector.exponent);
  set("initial", selector.initial);
  set("c", selector.c);
  set("beta", selector.beta);
  set("epsilon", selector.epsilon);
  return selector;
}

py::dict selector_options(const Buffer& buffer) {
  const replay::SelectorConfig& s = buffer.config().selector;
  using namespace py::literals;
  return py::dict("uniform"_a = s.uniform, "recency"_a = s.recency, "priority"_a = s.priority,
                  "recency_exponent"_a = s.recency_exponent, "curious"_a = s.curious, "exponent"_a = s.exponent,
                  "initial"_a = s.initial, "c"_a = s.c, "beta"_a = s.beta, "epsilon"_a = s.epsilon);
}

std::shared_ptr<Buffer> make_buffer(const Spec& spec, std::size_t capacity, std::size_t num_envs, std::uint64_t seed,
                                    const std::string& directory, bool prefault, const py::dict& selector,
                                    const std::tuple<double, std::uint64_t, double, double>& limiter) {
  if (num_envs > Buffer::kMaxEnvs)
    throw std::invalid_argument("num_envs: got " + std::to_string(num_envs) + ", expected at most " +
                                std::to_string(Buffer::kMaxEnvs));
  replay::Config config;
  for (const auto& [name, shape, dtype, latent] : spec) {
    std::size_t code = 0;
    while (code < replay::kNumDTypes && dtype != replay::kDTypes[code].name) ++code;
    if (code == replay::kNumDTypes) {
      std::string known;
      for (const replay::DType& entry : replay::kDTypes) known += std::string(known.empty() ? "" : ", ") + entry.name;
      throw std::invalid_argument("spec: key '" + name + "' has dtype " + dtype + ", expected one of " + known);
    }
    if (shape.size() > replay::kMaxAxes)
      throw std::invalid_argument("spec: key '" + name + "' has " + std::to_string(shape.size()) +
                                  " axes, expected at most " + std::to_string(replay::kMaxAxes));
    config.fields.push_back({name, code, shape, latent});
  }
  config.capacity = capacity;
  config.num_envs = num_envs;
  config.seed = seed;
  config.directory = directory;
  config.prefault = prefault;
  config.selector = selector_of(selector);
  config.limiter = {std::get<0>(limiter), std::get<1>(limiter), std::get<2>(limiter), std::get<3>(limiter)};
  const py::gil_scoped_release released;
  return std::make_shared<Buffer>(std::move(config));
}

Spec spec_of(const Buffer& buffer) {
  Spec spec;
  for (const Field& field : buffer.config().fields)
    spec.emplace_back(field.name, field.shape, field.dtype().name, field.latent);
  return spec;
}

auto limiter_of(const Buffer& buffer) {
  const replay::LimiterConfig& l = buffer.config().limiter;
  return std::make_tuple(l.samples_per_insert, l.min_size, l.lead, l.timeout);
}

bool is_native(const py::dtype& dtype) { return dtype.byteorder() == '=' || dtype.byteorder() == '|'; }

// How `value` is to be read if it is a (count, *shape) array of the field's dtype, or of one that is converted on the
// way, in any layout; pictures may have their channels last.
std::optional<replay::Source> source_of(PyObject* value, const Field& field, py::ssize_t count) {
  if (!py::isinstance<py::array>(value)) return std::nullopt;
  const auto array = py::reinterpret_borrow<py::array>(value);
  const py::dtype dtype = array.dtype();
  replay::Source source;
  const bool same = dtype.kind() == field.dtype().kind && std::size_t(dtype.itemsize()) == field.dtype().bytes;
  const std::string stored = field.dtype().name;
  if (!is_native(dtype)) return std::nullopt;
  if (!same) {
    if (dtype.kind() == 'f' && dtype.itemsize() == 8 && stored == "float32")
      source.conversion = replay::Conversion::kFloat64ToFloat32;
    else if (dtype.kind() == 'i' && dtype.itemsize() == 8 && stored == "int32")
      source.conversion = replay::Conversion::kInt64ToInt32;
    else
      return std::nullopt;
  }
  const std::size_t axes = field.shape.size();
  if (std::size_t(array.ndim()) != axes + 1 || array.shape(0) != count) return std::nullopt;
  std::copy(array.strides(), array.strides() + axes + 1, source.strides.begin());
  if (!std::equal(field.shape.begin(), field.shape.end(), array.shape() + 1)) {
    const auto& s = field.shape;
    const bool channels_last = axes == 3 && (s[0] == 1 || s[0] == 3 || s[0] == 4) && array.shape(1) == s[1] &&
                               array.shape(2) == s[2] && array.shape(3) == s[0];
    if (!channels_last) return std::nullopt;
    std::rotate(source.strides.begin() + 1, source.strides.begin() + 3, source.strides.begin() + 4);
  }
  source.data = static_cast<const std::byte*>(array.data());
  return source;
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

// False, with nothing stored, when the step is not in a form that is read here: then Python converts it or says what is
// wrong with it. A step that needs no such help costs this one call.
bool add(Buffer& buffer, const py::object& step, const py::object& env_ids) {
  const auto& fields = buffer.config().fields;
  if (!PyDict_CheckExact(step.ptr())) return false;
  const auto ids = ids_of(env_ids, buffer.config().num_envs);
  if (!ids) return false;
  std::vector<py::object> alive;  // another thread may change the dict while the GIL is released
  std::vector<replay::Source> sources;
  for (const Field& field : fields) {
    PyObject* value = PyDict_GetItemString(step.ptr(), field.name.c_str());
    if (value == nullptr) {
      if (!field.latent) return false;
      sources.emplace_back();
      continue;
    }
    auto source = source_of(value, field, py::ssize_t(ids->size()));
    if (!source) return false;
    alive.push_back(py::reinterpret_borrow<py::object>(value));
    sources.push_back(std::move(*source));
  }
  if (std::size_t(PyDict_Size(step.ptr())) != alive.size()) return false;  // a key that nobody asked for
  const py::gil_scoped_release released;
  buffer.add(ids->data(), ids->size(), sources, poll_signals);
  return true;
}

// Addresses of the caller's tensors: one per key, then step_id, probability and mask (0: not wanted).
using Addresses = std::tuple<std::vector<std::uintptr_t>, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

replay::Outputs outputs_of(const Buffer& buffer, const Addresses& addresses) {
  const auto& [columns, step_ids, probability, mask] = addresses;
  if (columns.size() != buffer.config().fields.size())
    throw std::invalid_argument("outputs: expected one for every key");
  replay::Outputs outputs;
  for (const std::uintptr_t address : columns) outputs.columns.push_back(reinterpret_cast<std::byte*>(address));
  outputs.step_ids = reinterpret_cast<std::int64_t*>(step_ids);
  outputs.probability = reinterpret_cast<double*>(probability);
  outputs.mask = reinterpret_cast<std::uint8_t*>(mask);
  return outputs;
}

void sample(Buffer& buffer, std::size_t batch, std::size_t length, const replay::SampleOptions& options,
            const Addresses& addresses) {
  const replay::Outputs outputs = outputs_of(buffer, addresses);
  const py::gil_scoped_release released;
  buffer.sample(batch, length, options, outputs, poll_signals);
}

// Episodes that were drawn, in two steps since only the draw tells how much memory they need.
class Episodes {
 public:
  Episodes(std::shared_ptr<Buffer> buffer, std::size_t batch) : buffer_(std::move(buffer)) {
    const py::gil_scoped_release released;
    draw_ = buffer_->draw_episodes(batch, poll_signals);
  }
  ~Episodes() { buffer_->finish(draw_); }
  Episodes(const Episodes&) = delete;
  Episodes& operator=(const Episodes&) = delete;

  std::size_t length() const { return draw_.length; }
  void copy(const Addresses& addresses) const {
    const replay::Outputs outputs = outputs_of(*buffer_, addresses);
    const py::gil_scoped_release released;
    for (std::size_t b = 0; b < draw_.sequences.size(); ++b) buffer_->copy(draw_, b, outputs);
  }

 private:
  const std::shared_ptr<Buffer> buffer_;
  replay::Draw draw_;
};

std::size_t update(Buffer& buffer, std::uintptr_t step_ids, std::size_t count, const std::vector<std::size_t>& fields,
                   const std::vector<std::uintptr_t>& addresses) {
  const py::gil_scoped_release released;
  std::vector<const std::byte*> values;
  for (const std::uintptr_t address : addresses) values.push_back(reinterpret_cast<const std::byte*>(address));
  return buffer.update(reinterpret_cast<const std::int64_t*>(step_ids), count, fields, values);
}

std::size_t prioritize(Buffer& buffer, std::uintptr_t step_ids, std::size_t count, std::uintptr_t values) {
  const py::gil_scoped_release released;
  return buffer.prioritize(reinterpret_cast<const std::int64_t*>(step_ids), count,
                           reinterpret_cast<const double*>(values));
}

bool read(Buffer& buffer, std::size_t env, std::uint64_t first, std::size_t count, std::size_t field,
          std::uintptr_t target) {
  const py::gil_scoped_release released;
  return buffer.read(env, first, count, field, reinterpret_cast<std::byte*>(target));
}

std::vector<std::pair<std::uint64_t, std::uint64_t>> spans(Buffer& buffer) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  const py::gil_scoped_release released;
  for (const replay::Span& span : buffer.spans()) spans.emplace_back(span.first, span.end);
  return spans;
}

std::unique_ptr<Loader> make_loader(std::shared_ptr<Buffer> buffer, std::size_t batch, std::size_t length,
                                    const replay::SampleOptions& options, const std::vector<Addresses>& slots,
                                    std::size_t threads) {
  std::vector<replay::Outputs> outputs;
  for (const Addresses& slot : slots) outputs.push_back(outputs_of(*buffer, slot));
  return std::make_unique<Loader>(std::move(buffer), batch, length, options, std::move(outputs), threads);
}

}  // namespace

void bind_replay(py::module_& module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  py::register_exception<replay::SnapshotError>(module, "ReplaySnapshotError", PyExc_RuntimeError);
  py::register_exception<replay::ClosedError>(module, "ReplayClosedError", PyExc_RuntimeError);
  py::register_exception<replay::TimeoutError>(module, "ReplayTimeoutError", PyExc_TimeoutError);
  py::class_<replay::SampleOptions>(module, "ReplaySampleOptions")
      .def(py::init([](bool online, bool cross_episodes, bool force_is_first) {
             return replay::SampleOptions{online, cross_episodes, force_is_first};
           }),
           py::arg("online"), py::arg("cross_episodes"), py::arg("force_is_first"));
  py::class_<Buffer, std::shared_ptr<Buffer>>(module, "ReplayBuffer")
      .def(py::init(&make_buffer), py::arg("spec"), py::arg("capacity"), py::arg("num_envs"), py::arg("seed"),
           py::arg("directory"), py::arg("prefault"), py::arg("selector"), py::arg("limiter"))
      .def("add", &add, py::arg("step"), py::arg("env_ids"))
      .def("sample", &sample, py::arg("batch"), py::arg("length"), py::arg("options"), py::arg("addresses"))
      .def("update", &update, py::arg("step_ids"), py::arg("count"), py::arg("fields"), py::arg("values"))
      .def("prioritize", &prioritize, py::arg("step_ids"), py::arg("count"), py::arg("values"))
      .def("read", &read, py::arg("env"), py::arg("first"), py::arg("count"), py::arg("field"), py::arg("target"))
      .def("spans", &spans)
      .def("num_sequences", &Buffer::num_sequences, py::arg("length"), Released())
      .def("ready", &Buffer::ready, py::arg("batch"), py::arg("length"), Released())
      .def("close", &Buffer::close, Released())
      .def(
          "save", [](Buffer& buffer, const std::string& path) { buffer.save(path, poll_signals); }, py::arg("path"),
          Released())
      .def_static(
          "load",
          [](const std::string& path, const std::string& directory) {
            return std::shared_ptr<Buffer>(Buffer::load(path, directory));
          },
          py::arg("path"), py::arg("directory"), Released())
      .def_property_readonly("size", py::cpp_function(&Buffer::size, Released()))
      .def_property_readonly("num_episodes", py::cpp_function(&Buffer::num_episodes, Released()))
      .def_property_readonly("total_added", py::cpp_function(&Buffer::total_added, Released()))
      .def_property_readonly("total_sampled", py::cpp_function(&Buffer::total_sampled, Released()))
      .def_property_readonly("capacity", [](const Buffer& buffer) { return buffer.config().capacity; })
      .def_property_readonly("num_envs", [](const Buffer& buffer) { return buffer.config().num_envs; })
      .def_property_readonly("step_bytes", &Buffer::step_bytes)
      .def_property_readonly("spec", &spec_of)
      .def_property_readonly("selector", &selector_options)
      .def_property_readonly("limiter", &limiter_of);
  py::class_<Episodes>(module, "ReplayEpisodes")
      .def(py::init<std::shared_ptr<Buffer>, std::size_t>(), py::arg("buffer"), py::arg("batch"))
      .def_property_readonly("length", &Episodes::length)
      .def("copy", &Episodes::copy, py::arg("addresses"));
  py::class_<Loader>(module, "ReplayLoader")
      .def(py::init(&make_loader), py::arg("buffer"), py::arg("batch"), py::arg("length"), py::arg("options"),
           py::arg("slots"), py::arg("threads"))
      .def(
          "next", [](Loader& loader) { return loader.next(poll_signals); }, Released())
      .def("ready", &Loader::ready, Released())
      .def("close", &Loader::close, Released());
}

}  // namespace phyx
