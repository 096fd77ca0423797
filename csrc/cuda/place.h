// Where a thread is: in its group and block, which units and rows are its own, and how their values come and
// go.
#pragma once

#include <cstdint>

#include "api.h"
#include "gpu.h"
#include "layout.h"
#include "numbers.h"

namespace sire_fast::cuda {

// A thread takes the steps of two neighbouring units, u and u + 1 of its block, for two rows of each tile of
// rows.
template <class Cell, class E, bool kBackward>
struct Place {
  static constexpr int kOperands = Shared<Cell, E, kBackward>::kOperands;
  const Pass& p;
  const Split split;
  const Shared<Cell, E, kBackward> shared;
  const int group, rank;
  const int unit0;                   // of the block
  const int warp, lane, tile, part;  // tile of units and part of the sum of this warp
  const int u, unit;
  int taken = 0;           // bits of the rows whose steps it takes
  int rows = 0;            // in use, the first ones of a tile
  uint32_t exchanges = 0;  // through the mailbox, so far
  uint32_t parities = 0;   // in a cluster: a bit for what is to arrive in each buffer

  SIRE_DEVICE explicit Place(const Pass& p)
      : p(p),
        split(p.H, p.blocks, kFactors<E>),
        shared(shared_memory(), split, p.blocks, p.mailbox),
        group(block() / p.blocks),
        rank(block() % p.blocks),
        unit0(rank * split.units()),
        warp(thread() / 32),
        lane(thread() % 32),
        tile(warp % split.tiles),
        part(warp / split.tiles),
        u(tile * kUnits + lane / 4 * 2),
        unit(unit0 + u) {
    const int sharing = split.splits < 2 * kTiles ? split.splits : 2 * kTiles;
    SIRE_EACH (n, 2 * kTiles)
      if (part == n * sharing / (2 * kTiles)) taken |= 1 << n;
  }

  // A thread has sums for these rows, of its units those at [n][..][c] and [n][..][c + 2]. Warps that share
  // them take the steps of some of the rows each.
  SIRE_DEVICE int row_of(int n, int c) const { return n * kTile + lane % 4 * 2 + c; }
  SIRE_DEVICE bool takes(int n, int c) const { return taken >> (2 * n + c) & 1; }

  // Calls body(n, c, row) for the rows in use that this thread takes.
  template <class F>
  SIRE_DEVICE void each_row(F body) const {
    SIRE_EACH (n, kTiles)
      SIRE_EACH (c, 2)
        if (takes(n, c) && row_of(n, c) < rows) body(n, c, row_of(n, c));
  }

  // The values of a row of H for this thread's units, 0 where there are none.
  SIRE_DEVICE void get(float (&to)[2], const float* row) const {
    SIRE_EACH (e, 2) to[e] = unit + e < p.H ? row[unit + e] : 0;
  }
  // Stores so many rows of H, one behind the other.
  template <int kCount, class V>
  SIRE_DEVICE void put(V* rows, const float (*from)[2]) const {
    if (unit >= p.H) return;
    rows += unit;
    if (p.H % 2 == 0)
      SIRE_EACH (k, kCount) store(rows + k * p.H, from[k]);
    else
      SIRE_EACH (k, kCount)
        SIRE_EACH (e, 2)
          if (unit + e < p.H) rows[k * p.H + e] = V(from[k][e]);
  }

  SIRE_DEVICE auto& visit(int tau, int row) const { return shared.visits[tau % kAhead * kRows + row]; }
  // of this thread's units
  SIRE_DEVICE float* own(int k, int row) const {
    return shared.own + k * (kRows * shared.state_stride) + (row * shared.state_stride + u);
  }
  SIRE_DEVICE float* after(int k, int row) const {
    return shared.after + k * (kRows * shared.state_stride) + (row * shared.state_stride + u);
  }
  // of all units of the block
  SIRE_DEVICE E* staged(int buffer, int field, int row) const {
    return shared.staged + (buffer * shared.kStaged + field) * (kRows * shared.staged_stride) +
           row * shared.staged_stride;
  }
  SIRE_DEVICE float* staged_state(int buffer, int field, int row) const {
    return shared.staged_states + (buffer * shared.kStagedStates + field) * (kRows * shared.state_stride) +
           row * shared.state_stride;
  }
  // factors of a row of a product, for the units of all blocks
  SIRE_DEVICE E* operand(int buffer, int field, int row) const {
    const int at = shared.buffers > 1 ? buffer : 0;
    return shared.operand + (at * shared.kOperands + field) * (kRows * shared.operand_stride) +
           row * shared.operand_stride;
  }
  SIRE_DEVICE uint4* operand_piece(int buffer, int of_rank, int row, int at) const {
    return aligned<uint4>(operand(buffer, 0, row) + of_rank * split.units() + at);
  }

  // Calls body(row, u) for the pieces of 16 bytes of this block's units in the rows in use: those from u on.
  template <class V, class F>
  SIRE_DEVICE void each_piece(F body) const {
    const int bits = piece_bits<V>(), at = piece<V>();
    if (at < split.units())
      for (int row = thread() >> bits; row < rows; row += threads() >> bits) body(row, at);
  }
  // Calls body(row, u, first, step) for them: where threads are left, several share a piece, and each has
  // every `step`th of the other blocks of the group, from the first on.
  template <class V, class F>
  SIRE_DEVICE void each_shared_piece(F body) const {
    const int turn = thread() >> piece_bits<V>(), turns = threads() >> piece_bits<V>(), at = piece<V>();
    const int step = turns < kRows ? 1 : turns / kRows;
    if (at < split.units() && turn / kRows < step)
      for (int row = turn % kRows; row < rows; row += turns) body(row, at, turn / kRows, step);
  }
  template <class V>
  SIRE_DEVICE int piece_bits() const {
    return split.tile_bits + (sizeof(V) == 4 ? 2 : 1);
  }
  template <class V>
  SIRE_DEVICE int piece() const {
    return (thread() & ((1 << piece_bits<V>()) - 1)) * (16 / int(sizeof(V)));
  }

  // Starts to copy, for each row, this block's units of kFields rows of H values, the first of which is
  // source(row). Where that is null, what was there stays; units beyond H are 0.
  template <int kFields, class V, class Source>
  SIRE_DEVICE void fetch(V* to, int stride, Source source) const {
    constexpr int kPiece = 16 / int(sizeof(V));
    each_piece<V>([&](int row, int at) {
      const V* from = source(row);
      if (!from) return;
      from += unit0 + at;
      V* piece = to + row * stride + at;
      const int field_size = kRows * stride, there = p.H - unit0 - at;  // there: values from here on
      const auto address = reinterpret_cast<uintptr_t>(from) | p.H * sizeof(V);
      if (address % 16 == 0 && there >= kPiece) {
        SIRE_EACH (field, kFields) copy_async<16>(piece + field * field_size, from + field * p.H);
      } else if (sizeof(V) == 4 || address % 4 == 0) {
        SIRE_ROLLED
        for (int field = 0; field < kFields; ++field) {
          constexpr int kWord = 4 / int(sizeof(V));
          for (int n = 0; n < kPiece; n += kWord) {
            V* word = piece + field * field_size + n;
            if (n < there)
              copy_async<4>(word, from + field * p.H + n);
            else
              *aligned<uint32_t>(word) = 0;
          }
        }
      } else {
        V values[kFields][kPiece];  // all on their way at once
        SIRE_EACH (field, kFields)
          SIRE_EACH (n, kPiece) values[field][n] = n < there ? from[field * p.H + n] : V(0.0f);
        SIRE_EACH (field, kFields)
          SIRE_EACH (n, kPiece) piece[field * field_size + n] = values[field][n];
      }
    });
  }
};

}  // namespace sire_fast::cuda
