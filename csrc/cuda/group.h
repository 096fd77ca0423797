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

// Calls body(peer) for every `step`th of the other blocks of the group, from the first behind this one on.
template <class Cell, class E, bool kBackward, class F>
SIRE_DEVICE void each_peer(const Place<Cell, E, kBackward>& at, int first, int step, F body) {
  const int blocks = at.p.blocks;
  for (int n = at.rank + 1 + first; n < at.rank + blocks; n += step) body(n < blocks ? n : n - blocks);
}

// What was fetched has come, and nobody of the cluster is behind.
template <class Cell, class E, bool kBackward>
SIRE_DEVICE void meet(const Place<Cell, E, kBackward>& at) {
  wait_for_copies();
  at.p.blocks > 1 && !at.p.mailbox ? cluster_barrier() : barrier();
}

// Two buffers suffice: who sends to one has what all others have sent to the other buffer, and they have sent
// that behind a barrier which their threads reach when they have read the first. Nor does a phase of arrivals
// begin before all threads have seen the end of the one before. What has ended a pass nobody waits for: then
// they `meet`.
template <class Cell, class E, bool kBackward>
SIRE_DEVICE void exchange_in_cluster(Place<Cell, E, kBackward>& at, int buffer) {
  constexpr int kOperands = Place<Cell, E, kBackward>::kOperands;
  const int blocks = at.p.blocks;
  Arrivals* arrivals = at.shared.arrivals + buffer;
  if (!thread())
    expect_arrivals(arrivals, (blocks - 1) * kOperands * at.rows * at.split.units() * int(sizeof(E)));
  at.template each_shared_piece<E>([&](int row, int u, int first, int step) {
    uint4 values[kOperands];
    SIRE_EACH (k, kOperands) values[k] = *at.operand_piece(buffer, at.rank, k * kRows + row, u);
    each_peer(at, first, step, [&](int peer) {
      SIRE_EACH (k, kOperands)
        send(at.operand_piece(buffer, at.rank, k * kRows + row, u), arrivals, peer, values[k]);
    });
  });
  wait_for_arrivals(arrivals, at.parities >> buffer & 1);
  at.parities ^= 1u << buffer;
}

template <class Cell, class E, bool kBackward>
SIRE_DEVICE void exchange_in_mailbox(Place<Cell, E, kBackward>& at, int buffer) {
  constexpr int kOperands = Place<Cell, E, kBackward>::kOperands;
  const int blocks = at.p.blocks, width = blocks * at.split.units();
  E* mailbox = static_cast<E*>(at.p.mailbox) + (at.group * 2 + at.exchanges % 2) * kOperands * kRows * width;
  const auto mailed = [&](int rank, int row, int u) {
    return aligned<uint4>(mailbox + row * width + rank * at.split.units() + u);
  };
  at.template each_piece<E>([&](int row, int u) {
    SIRE_EACH (k, kOperands)
      *mailed(at.rank, k * kRows + row, u) = *at.operand_piece(buffer, at.rank, k * kRows + row, u);
  });
  group_barrier(at.p.arrived + at.group * blocks, at.rank, blocks, ++at.exchanges);
  at.template each_shared_piece<E>([&](int row, int u, int first, int step) {
    each_peer(at, first, step, [&](int peer) {
      SIRE_EACH (k, kOperands)
        copy_async<16>(at.operand_piece(buffer, peer, k * kRows + row, u), mailed(peer, k * kRows + row, u));
    });
  });
  wait_for_copies();
  barrier();
}

// Ends a step: what was fetched has come, and so have the operands of all blocks.
template <class Cell, class E, bool kBackward>
SIRE_DEVICE void exchange(Place<Cell, E, kBackward>& at, int buffer) {
  wait_for_copies();
  barrier();
  if (at.p.blocks > 1) at.p.mailbox ? exchange_in_mailbox(at, buffer) : exchange_in_cluster(at, buffer);
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
