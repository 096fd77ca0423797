// The Python module sire_fast._cuda: numbers, addresses and a stream in, one of the kernels of cuda/api.h
// started.
#include "bindings.h"
#include "cuda/api.h"
#ifdef SIRE_ON_HOST
#include "gpu_on_host.h"
#endif

namespace py = pybind11;
using namespace sire_fast;
using namespace sire_fast::cuda;

namespace {

using Numbers = std::vector<int>;
void read_pass(Pass& to, const Numbers& n, Reader& next) {
  to.T = n.at(0), to.B = n.at(1), to.K = n.at(2), to.H = n.at(3);
  to.S = n.at(4), to.N = n.at(5), to.V = n.at(6), to.groups = n.at(7), to.blocks = n.at(8), to.tf32 = n.at(9);
  next(to.mailbox, to.arrived, to.x, to.w_hh, to.b_hh, to.start[0], to.start[1], to.swaps, to.ends,
       to.lengths);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw py::value_error("dtype: got " + name);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of sire_fast; called by sire_fast.backends.cuda, which knows the order of the addresses.";
#ifdef SIRE_ON_HOST
  m.attr("device") = "cpu";
  m.def("run_at_once", [](int clusters) { gpu::machine.clusters = clusters; });
#else
  m.attr("device") = "cuda";
#endif
  m.attr("architectures") = SIRE_ARCHITECTURES;  // as TORCH_CUDA_ARCH_LIST has them
  m.attr("rows") = kRows;
  m.def("blocks", [](int H, const std::string& dtype) { return blocks(H, dtype_of(dtype)); });
  m.def("shared_bytes",
        [](const std::string& cell, const std::string& dtype, int H, int blocks, bool mailbox) {
          return shared_bytes(cell_number(cell), dtype_of(dtype), H, blocks, mailbox);
        });
  m.def("mailbox_bytes", [](const std::string& cell, const std::string& dtype, int H, int blocks) {
    return mailbox_bytes(cell_number(cell), dtype_of(dtype), H, blocks);
  });
  m.def("clusters", [](const std::string& cell, const std::string& dtype, int H, int blocks) {
    return clusters(cell_number(cell), dtype_of(dtype), H, blocks);
  });
  m.def("versions", [] { return std::make_pair(versions().driver, versions().runtime); });
  m.def("saved_gates", [](const std::string& cell) { return saved_gates(cell_number(cell)); });
  m.def("gradients", [](const std::string& cell) { return gradients(cell_number(cell)); });
  m.def("forward", [](const std::string& cell, const std::string& dtype, const Numbers& numbers,
                      const Addresses& addresses, uintptr_t stream) {
    Forward f{};
    Reader next(addresses);
    read_pass(f, numbers, next);
    next(f.states[0], f.states[1], f.last[0], f.last[1], f.variants[0], f.variants[1], f.penalty, f.gates,
         f.spans);
    forward(cell_number(cell), dtype_of(dtype), f, stream);
  });
  m.def("backward", [](const std::string& cell, const std::string& dtype, const Numbers& numbers,
                       const Addresses& addresses, uintptr_t stream) {
    Backward g{};
    Reader next(addresses);
    read_pass(g, numbers, next);
    next(g.d_states[0], g.d_states[1], g.d_last[0], g.d_last[1], g.d_variants[0], g.d_variants[1],
         g.d_penalty);
    next(g.states[0], g.states[1], g.gates, g.spans, g.end_times, g.end_order, g.start_times, g.start_order);
    next(g.dx, g.du, g.d_spans, g.d_first, g.d_start[0], g.d_start[1]);
    backward(cell_number(cell), dtype_of(dtype), g, stream);
  });
  m.def("gather", [](const std::string& cell, const std::string& dtype, const Numbers& numbers,
                     const Addresses& addresses, uintptr_t stream) {
    Gather call{};
    call.T = numbers.at(0), call.B = numbers.at(1), call.K = numbers.at(2), call.H = numbers.at(3),
    call.S = numbers.at(4);
    Reader next(addresses);
    next(call.swaps, call.ends, call.spans, call.d_spans, call.d_first, call.dx);
    gather(cell_number(cell), dtype_of(dtype), call, stream);
  });
  m.def("barriers", [](int count, int blocks, uintptr_t arrived, uintptr_t stream) {
    barriers({count, blocks, reinterpret_cast<uint32_t*>(arrived)}, stream);
  });
}
