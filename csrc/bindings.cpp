// The Python module sire_fast._C: numbers and addresses in, one of the entry points of swap_rnn.h called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "swap_rnn.h"

namespace py = pybind11;
using namespace sire_fast;

namespace {

using Addresses = std::vector<uintptr_t>;

// Reads addresses one after the other, in the order in which the Python side lists them.
class Reader {
 public:
  explicit Reader(const Addresses& addresses) : next_(addresses.begin()) {}
  template <class T>
  T* get() {
    return reinterpret_cast<T*>(*next_++);
  }

 private:
  Addresses::const_iterator next_;
};

template <class T>
void run_forward(int cell, int threads, bool train, const Sizes& size, const Addresses& inputs,
                 const Addresses& outputs) {
  Forward<T> f{};
  f.size = size;
  f.train = train;
  Reader in(inputs), out(outputs);
  f.x_proj = in.get<const T>();
  f.w_hh = in.get<const T>();
  f.b_hh = in.get<const T>();
  for (auto& start : f.start) start = in.get<const T>();
  f.swaps.swaps = in.get<const int64_t>();
  f.swaps.ends = in.get<const int64_t>();
  f.swaps.lengths = in.get<const int64_t>();
  f.states[0] = out.get<T>();
  for (auto& last : f.last) last = out.get<T>();
  f.variants[0] = out.get<T>();
  f.penalty = out.get<T>();
  f.states[1] = out.get<T>();
  f.variants[1] = out.get<T>();
  f.gates = out.get<T>();
  f.spans = out.get<T>();
  forward(cell, f, threads);
}

template <class T>
void run_backward(int cell, int threads, const Sizes& size, const Addresses& inputs,
                  const Addresses& outputs) {
  Backward<T> g{};
  g.size = size;
  Reader in(inputs), out(outputs);
  g.d_states[0] = in.get<const T>();
  for (auto& last : g.d_last) last = in.get<const T>();
  g.d_variants[0] = in.get<const T>();
  g.d_penalty = in.get<const T>();
  g.d_states[1] = in.get<const T>();
  g.d_variants[1] = in.get<const T>();
  g.w_hh = in.get<const T>();
  for (auto& start : g.start) start = in.get<const T>();
  g.swaps.swaps = in.get<const int64_t>();
  g.swaps.ends = in.get<const int64_t>();
  g.swaps.lengths = in.get<const int64_t>();
  for (auto& states : g.states) states = in.get<const T>();
  g.gates = in.get<const T>();
  g.spans = in.get<const T>();
  g.dx_proj = out.get<T>();
  g.dw_hh = out.get<T>();
  g.db_hh = out.get<T>();
  for (auto& start : g.d_start) start = out.get<T>();
  backward(cell, g, threads);
}

constexpr std::array<const char*, kCells> kCellNames{"rnn_tanh", "rnn_relu", "gru", "lstm"};

int cell_number(const std::string& name) {
  for (int n = 0; n < kCells; ++n)
    if (name == kCellNames[n]) return n;
  throw py::value_error("cell: got " + name);
}

using SizeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

Sizes sizes(const SizeTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)}; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sire_fast; called by sire_fast.cpu, which knows the order of the addresses.";
  m.def("saved_gates", [] {
    py::dict saved;
    for (int n = 0; n < kCells; ++n) saved[kCellNames[n]] = instruction_set()->f32[n].saved;
    return saved;
  });
  m.def("instruction_set", [] { return instruction_set()->name; });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto* set : instruction_sets()) names.push_back(set->name);
    return names;
  });
  m.def("use_instruction_set", [](const std::string& name) {  // for tests
    for (const auto* set : instruction_sets())
      if (name == set->name) {
        instruction_set() = set;
        return;
      }
    throw py::value_error("instruction set: this machine has no " + name);
  });
  m.def("forward", [](const std::string& cell, bool is_double, int threads, bool train, const SizeTuple& size,
                      const Addresses& inputs, const Addresses& outputs) {
    const int number = cell_number(cell);
    py::gil_scoped_release unlocked;
    (is_double ? run_forward<double> : run_forward<float>)(number, threads, train, sizes(size), inputs,
                                                           outputs);
  });
  m.def("backward", [](const std::string& cell, bool is_double, int threads, const SizeTuple& size,
                       const Addresses& inputs, const Addresses& outputs) {
    const int number = cell_number(cell);
    py::gil_scoped_release unlocked;
    (is_double ? run_backward<double> : run_backward<float>)(number, threads, sizes(size), inputs, outputs);
  });
}
