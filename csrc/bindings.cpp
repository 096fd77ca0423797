// The Python module sire_fast._C: numbers and addresses in, one of the entry points of swap_rnn.h called.
#include "bindings.h"

#include <limits>
#include <memory>
#include <tuple>

#include "memory.h"
#include "swap_rnn.h"

namespace py = pybind11;
using namespace sire_fast;

namespace {

// What has to be there must not be null: tensors of a trace have no memory.
template <class... P>
void require(P*... pointers) {
  if ((!pointers || ...)) throw py::value_error("sire_fast._C: a null pointer, of a tensor without memory");
}

using SizeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

template <class T>
void read_inputs(Inputs<T>& to, const SizeTuple& size, bool recompute, Reader& next) {
  std::apply([&](auto... sizes) { to.size = {sizes...}; }, size);
  to.recompute = recompute;
  next(to.x, to.w_ih, to.b_ih, to.w_hh, to.b_hh, to.start[0], to.start[1]);
  next(to.swaps.swaps, to.swaps.ends, to.swaps.lengths);
  require(to.x, to.w_hh, to.start[0], to.swaps.lengths);
  if (to.size.K) require(to.swaps.swaps, to.swaps.ends);
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

// Whether all positions are inside their sequences. Throws where there are fewer than the rows of `spans`
// that they need.
bool fits(const Sizes& z, const Swaps& s, int64_t rows) {
  const int64_t needed = span_rows(z.T, z.B, z.K, s);
  if (needed > rows)
    throw py::value_error("span_rows: expected at least " + std::to_string(needed) + ", got " +
                          std::to_string(rows));
  return needed >= 0;
}

template <class T>
bool run_forward(const Kernels<T>& kernels, int threads, bool train, bool recompute, const SizeTuple& size,
                 int64_t rows, const Addresses& inputs, const Addresses& outputs) {
  Forward<T> f{};
  Reader next(inputs), next_output(outputs);
  read_inputs(f, size, recompute, next);
  f.train = train;
  next_output(f.states[0], f.last[0], f.last[1], f.variants[0], f.penalty, f.states[1], f.variants[1],
              f.gates, f.spans);
  require(f.states[0], f.last[0]);
  if (!fits(f.size, f.swaps, train ? rows : std::numeric_limits<int64_t>::max())) return false;
  forward(kernels, f, threads);
  return true;
}

template <class T>
bool run_backward(const Kernels<T>& kernels, int threads, bool recompute, const SizeTuple& size, int64_t rows,
                  const Addresses& inputs, const Addresses& outputs) {
  Backward<T> g{};
  Reader next(inputs), next_output(outputs);
  next(g.d_states[0], g.d_last[0], g.d_last[1], g.d_variants[0], g.d_penalty, g.d_states[1], g.d_variants[1]);
  read_inputs(g, size, recompute, next);
  next(g.states[0], g.states[1], g.gates, g.spans);
  require(g.states[0]);
  if (!fits(g.size, g.swaps, rows)) return false;
  next_output(g.dx, g.dw_ih, g.db_ih, g.dw_hh, g.db_hh, g.d_start[0], g.d_start[1]);
  backward(kernels, g, threads);
  return true;
}

static_assert(sizeof kCellNames / sizeof *kCellNames == kCells);

// Returns run(kernels), called with those for arithmetic in "float32", "float64", or "bfloat16": products of
// bfloat16.
template <class F>
auto with_kernels(const std::string& cell, const std::string& arithmetic, const F& run) {
  const InstructionSet& set = *instruction_set();
  const int number = cell_number(cell);
  py::gil_scoped_release unlocked;
  if (arithmetic == "float64") return run(set.f64[number]);
  return run((arithmetic == "bfloat16" ? set.bf16 : set.f32)[number]);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of sire_fast; called by sire_fast.backends.cpu, which knows the order of the "
      "addresses.";
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
  py::class_<Memory>(m, "Memory", py::buffer_protocol(), py::module_local())
      .def(py::init([](size_t bytes) { return std::make_unique<Memory>(bytes, true); }))
      .def_property_readonly_static("large", [](py::object) { return Memory::kLarge; })
      .def_buffer([](Memory& memory) {
        return py::buffer_info(static_cast<uint8_t*>(memory.get()), py::ssize_t(memory.bytes()));
      });
  m.def("span_rows", [](int64_t T, int64_t B, int64_t K, uintptr_t swaps, uintptr_t ends, uintptr_t lengths) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
    require(at(lengths));
    if (K) require(at(swaps), at(ends));
    return span_rows(T, B, K, {at(swaps), at(ends), at(lengths)});
  });
  // Both return false, and have done nothing, where a position is outside its sequence.
  m.def("forward",
        [](const std::string& cell, const std::string& arithmetic, int threads, bool train, bool recompute,
           const SizeTuple& size, int64_t rows, const Addresses& inputs, const Addresses& outputs) {
          return with_kernels(cell, arithmetic, [&](const auto& k) {
            return run_forward(k, threads, train, recompute, size, rows, inputs, outputs);
          });
        });
  m.def("backward",
        [](const std::string& cell, const std::string& arithmetic, int threads, bool recompute,
           const SizeTuple& size, int64_t rows, const Addresses& inputs, const Addresses& outputs) {
          return with_kernels(cell, arithmetic, [&](const auto& k) {
            return run_backward(k, threads, recompute, size, rows, inputs, outputs);
          });
        });
}
