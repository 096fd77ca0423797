// How the blocks of a group wait for each other, and hand each other the operands of the next product.
#pragma once

#include <cstdint>

#include "api.h"
#include "gpu.h"
#include "layout.h"
#include "place.h"

namespace sire_fast::cuda {

// A barrier of a group that is no cluster, its `count`th.
SIRE_DEVICE void group_barrier(uint32_t* arrived, int rank, int blocks, uint32_t count) {
  barrier();
  if (!thread()) publish(arrived + rank, count);
  for (int n = thread(); n < blocks; n += threads()) wait_for(arrived + n, count);
  barrier();
}

// Calls body(peer) for all other blocks of the group, the next one first.
template <class Cell, class E, bool kBackward, class F>
SIRE_DEVICE void each_peer(const Place<Cell, E, kBackward>& at, F body) {
  const Pass& p = at.p;
  for (int peer = at.rank + 1; peer != at.rank + p.blocks; ++peer)
    body(peer < p.blocks ? peer : peer - p.blocks);
}

// What was fetched has come, and nobody of the cluster is behind.
template <class Cell, class E, bool kBackward>
SIRE_DEVICE void meet(const Place<Cell, E, kBackward>& at) {
  wait_for_copies();
  at.p.blocks > 1 && !at.p.mailbox ? cluster_barrier() : barrier();
}

template <class Cell, class E, bool kBackward>
SIRE_DEVICE void exchange_in_cluster(const Place<Cell, E, kBackward>& at, int buffer) {
  at.template each_piece<E>(at.shared.kOperands * kRows, [&](int row, int u) {
    uint4* piece = at.operand_piece(buffer, at.rank, row, u);
    const uint4 value = *piece;
    each_peer(at, [&](int peer) { store_to_peer(piece, peer, value); });
  });
}

template <class Cell, class E, bool kBackward>
SIRE_DEVICE void exchange_in_mailbox(Place<Cell, E, kBackward>& at, int buffer) {
  const int rows = at.shared.kOperands * kRows, width = at.p.blocks * at.split.units();
  E* mailbox = static_cast<E*>(at.p.mailbox) + (at.group * 2 + at.exchanges % 2) * rows * width;
  const auto mailed = [&](int rank, int row, int u) {
    return aligned<uint4>(mailbox + row * width + rank * at.split.units() + u);
  };
  at.template each_piece<E>(
      rows, [&](int row, int u) { *mailed(at.rank, row, u) = *at.operand_piece(buffer, at.rank, row, u); });
  group_barrier(at.p.arrived + at.group * at.p.blocks, at.rank, at.p.blocks, ++at.exchanges);
  at.template each_piece<E>(rows, [&](int row, int u) {
    each_peer(
        at, [&](int peer) { copy_async<16>(at.operand_piece(buffer, peer, row, u), mailed(peer, row, u)); });
  });
}

// Ends a step: as `meet`, and the operands of all blocks have come to this one.
template <class Cell, class E, bool kBackward>
SIRE_DEVICE void exchange(Place<Cell, E, kBackward>& at, int buffer) {
  if (at.p.blocks > 1) {
    barrier();
    at.p.mailbox ? exchange_in_mailbox(at, buffer) : exchange_in_cluster(at, buffer);
  }
  meet(at);
}

// Nothing but barriers, to time them.
SIRE_KERNEL(32 * kWarps) barriers_kernel(const Barriers call) {
  for (int n = 0; n < call.count; ++n) {
    if (call.arrived)
      group_barrier(call.arrived, block(), call.blocks, uint32_t(n + 1));
    else if (call.blocks > 1)
      cluster_barrier();
    else
      barrier();
  }
}

}  // namespace sire_fast::cuda
