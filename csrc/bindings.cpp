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

using SizeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

template <class T>
void read_inputs(Inputs<T>& to, const SizeTuple& size, bool recompute, Reader& in) {
  std::apply([&](auto... sizes) { to.size = {sizes...}; }, size);
  to.recompute = recompute;
  for (const T** p : {&to.x, &to.w_ih, &to.b_ih, &to.w_hh, &to.b_hh, &to.start[0], &to.start[1]})
    *p = in.get<const T>();
  for (const int64_t** p : {&to.swaps.swaps, &to.swaps.ends, &to.swaps.lengths}) *p = in.get<const int64_t>();
}

template <class T>
void run_forward(const Kernels<T>& kernels, int threads, bool train, bool recompute, const SizeTuple& size,
                 const Addresses& inputs, const Addresses& outputs) {
  Forward<T> f{};
  Reader in(inputs), out(outputs);
  read_inputs(f, size, recompute, in);
  f.train = train;
  for (T** p : {&f.states[0], &f.last[0], &f.last[1], &f.variants[0], &f.penalty, &f.states[1],
                &f.variants[1], &f.gates, &f.spans})
    *p = out.get<T>();
  forward(kernels, f, threads);
}

template <class T>
void run_backward(const Kernels<T>& kernels, int threads, bool recompute, const SizeTuple& size,
                  const Addresses& inputs, const Addresses& outputs) {
  Backward<T> g{};
  Reader in(inputs), out(outputs);
  for (const T** p : {&g.d_states[0], &g.d_last[0], &g.d_last[1], &g.d_variants[0], &g.d_penalty,
                      &g.d_states[1], &g.d_variants[1]})
    *p = in.get<const T>();
  read_inputs(g, size, recompute, in);
  for (const T** p : {&g.states[0], &g.states[1], &g.gates, &g.spans}) *p = in.get<const T>();
  for (T** p : {&g.dx, &g.dw_ih, &g.db_ih, &g.dw_hh, &g.db_hh, &g.d_start[0], &g.d_start[1]})
    *p = out.get<T>();
  backward(kernels, g, threads);
}

constexpr std::array<const char*, kCells> kCellNames{"rnn_tanh", "rnn_relu", "gru", "lstm"};

int cell_number(const std::string& name) {
  for (int n = 0; n < kCells; ++n)
    if (name == kCellNames[n]) return n;
  throw py::value_error("cell: got " + name);
}

// Calls run(kernels) with those for arithmetic in "float32", "float64", or "bfloat16": products of bfloat16.
template <class F>
void with_kernels(const std::string& cell, const std::string& arithmetic, const F& run) {
  const InstructionSet& set = *instruction_set();
  const int number = cell_number(cell);
  py::gil_scoped_release unlocked;
  if (arithmetic == "float64")
    run(set.f64[number]);
  else
    run((arithmetic == "bfloat16" ? set.bf16 : set.f32)[number]);
}

// Rows of `spans`, (S + N)*H values each, that a call needs; -1 if a length, a swap or an end is outside its
// sequence.
int64_t span_rows(int64_t T, int64_t B, int64_t K, const Swaps& s) {
  int64_t rows = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = s.lengths[b];
    if (length < 1 || length > T) return -1;
    for (int64_t v = b * K; v < (b + 1) * K; ++v) {
      const int64_t i = s.swaps[2 * v], j = s.swaps[2 * v + 1], end = s.ends[v];
      if (i < 0 || i > j || j > end || end >= length) return -1;
      if (i < j) rows += end - i + 1;
    }
  }
  return rows;
}

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
  m.def("advise_huge_pages",
        [](uintptr_t p, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(p), bytes); });
  m.def("span_rows", [](int64_t T, int64_t B, int64_t K, uintptr_t swaps, uintptr_t ends, uintptr_t lengths) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
    return span_rows(T, B, K, {at(swaps), at(ends), at(lengths)});
  });
  m.def("forward", [](const std::string& cell, const std::string& arithmetic, int threads, bool train,
                      bool recompute, const SizeTuple& size, const Addresses& inputs,
                      const Addresses& outputs) {
    with_kernels(cell, arithmetic,
                 [&](const auto& k) { run_forward(k, threads, train, recompute, size, inputs, outputs); });
  });
  m.def("backward", [](const std::string& cell, const std::string& arithmetic, int threads, bool recompute,
                       const SizeTuple& size, const Addresses& inputs, const Addresses& outputs) {
    with_kernels(cell, arithmetic,
                 [&](const auto& k) { run_backward(k, threads, recompute, size, inputs, outputs); });
  });
}
