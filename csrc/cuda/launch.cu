// Persistent kernels: W_hh stays in registers for all steps, the states go through shared memory once a step.
//
// A warp has 16 units, all of their gates, and of the sum over h up to kSlots tiles; where H is larger,
// several warps share the units, and several blocks, a group, the tile. The gates of a unit for a row meet in
// one thread, which takes the cell's step for it: the only exchange in a step is that of the new states
// (backward: of the gates' gradients) between the blocks of the group: one barrier of the block a step, and
// what the others have sent.
//
// Here is what starts them, for each cell and dtype on a grid of its size; this file alone is compiled. To
// read: layout.h, place.h, product.h, group.h, tile.h, forward.h, backward.h, gather.h.
#include <cstdint>

#include "../cells.h"
#include "api.h"
#include "backward.h"
#include "forward.h"
#include "gather.h"
#include "gpu.h"
#include "group.h"
#include "layout.h"

namespace sire_fast::cuda {
namespace {

// Calls run(Cell(), E()) for a cell by its number and for a dtype.
template <class F>
void dispatch(int cell, Dtype dtype, F run) {
  const auto with_cell = [&](auto c) {
    if (dtype == Dtype::float32) return run(c, float());
    if (dtype == Dtype::bfloat16) return run(c, Bfloat16());
    return run(c, Float16());
  };
  if (cell == 0) return with_cell(RnnTanh());
  if (cell == 1) return with_cell(RnnRelu());
  if (cell == 2) return with_cell(Gru());
  return with_cell(Lstm());
}

template <class Cell, class E, bool kBackward>
Grid grid_of(int H, int groups, int blocks, bool mailbox) {
  const Split split(H, blocks, kFactors<E>);
  Grid grid{int64_t(groups) * blocks, 32 * split.warps(), 0, mailbox ? 1 : blocks, mailbox};
  grid.shared = Shared<Cell, E, kBackward>(nullptr, split, blocks, mailbox).bytes;
  return grid;
}

template <class Cell, class E, bool kBackward, class Call>
void launch_tiles(void (*kernel)(Call), const Call& call, uintptr_t stream) {
  launch(kernel, grid_of<Cell, E, kBackward>(call.H, call.groups, call.blocks, call.mailbox), stream, call);
}

}  // namespace

int blocks(int H, Dtype dtype) {
  const Split whole(H, 1, dtype == Dtype::float32 ? 1 : 2);
  return whole.splits > kWarps ? 0 : ceil_div(whole.tiles, kWarps / whole.splits);
}

int64_t shared_bytes(int cell, Dtype dtype, int H, int blocks, bool mailbox) {
  int64_t bytes = 0;
  dispatch(cell, dtype, [&](auto c, auto e) {
    const Split split(H, blocks, kFactors<decltype(e)>);
    bytes = Shared<decltype(c), decltype(e), true>(nullptr, split, blocks, mailbox).bytes;
  });
  return bytes;
}

int64_t mailbox_bytes(int cell, Dtype dtype, int H, int blocks) {
  int64_t bytes = 0;
  dispatch(cell, dtype, [&](auto c, auto e) {
    const Split split(H, blocks, kFactors<decltype(e)>);
    bytes = 2 * int64_t(decltype(c)::gates) * kRows * blocks * split.units() * int(sizeof e);
  });
  return bytes;
}

int clusters(int cell, Dtype dtype, int H, int blocks) {
  int at_once = 0;
  dispatch(cell, dtype, [&](auto c, auto e) {
    using Cell = decltype(c);
    using E = decltype(e);
    const int forward =
        clusters_at_once(forward_kernel<Cell, E>, grid_of<Cell, E, false>(H, 1, blocks, false));
    const int backward =
        clusters_at_once(backward_kernel<Cell, E>, grid_of<Cell, E, true>(H, 1, blocks, false));
    at_once = forward < backward ? forward : backward;
  });
  return at_once;
}

Versions versions() { return {driver_version(), runtime_version()}; }

int saved_gates(int cell) {
  int saved = 0;
  dispatch(cell, Dtype::float32, [&](auto c, auto) { saved = decltype(c)::saved; });
  return saved;
}

int gradients(int cell) {
  int gradients = 0;
  dispatch(cell, Dtype::float32, [&](auto c, auto) { gradients = decltype(c)::gradients; });
  return gradients;
}

void forward(int cell, Dtype dtype, const Forward& f, uintptr_t stream) {
  dispatch(cell, dtype, [&](auto c, auto e) {
    using Cell = decltype(c);
    using E = decltype(e);
    launch_tiles<Cell, E, false>(forward_kernel<Cell, E>, f, stream);
  });
}

void backward(int cell, Dtype dtype, const Backward& g, uintptr_t stream) {
  dispatch(cell, dtype, [&](auto c, auto e) {
    using Cell = decltype(c);
    using E = decltype(e);
    launch_tiles<Cell, E, true>(backward_kernel<Cell, E>, g, stream);
  });
}

void gather(int cell, Dtype dtype, const Gather& call, uintptr_t stream) {
  dispatch(cell, dtype, [&](auto c, auto e) {
    const Grid grid{int64_t(call.B) * (call.K + call.T), kGatherThreads, 0, 1, false};
    launch(gather_kernel<decltype(c), decltype(e)>, grid, stream, call);
  });
}

void barriers(const Barriers& call, uintptr_t stream) {
  const bool cooperative = call.arrived;
  const Grid grid{call.blocks, 32 * kWarps, 0, cooperative ? 1 : call.blocks, cooperative};
  launch(barriers_kernel, grid, stream, call);
}

}  // namespace sire_fast::cuda
