// The tile that a block works on: which sequence or variant a row is in each pass, and where its values are
// in the tensors.
#pragma once

#include <cstdint>

#include "api.h"
#include "gpu.h"
#include "group.h"
#include "layout.h"
#include "place.h"
#include "product.h"

namespace sire_fast::cuda {

// A thread's view of the tile.
template <class Cell, class E, bool kBackward>
struct Tile : Product<Cell, E, kBackward> {
  using Base = Product<Cell, E, kBackward>;
  using Base::group, Base::p, Base::rows, Base::shared;
  static constexpr int STATES = Cell::states;
  int first_sequence;
  int steps;  // of a pass

  SIRE_DEVICE explicit Tile(const Pass& p) : Base(p) {
    auto* operands = reinterpret_cast<uint4*>(shared.operand);
    for (int n = thread(); n < shared.operand_pieces(); n += threads()) operands[n] = {};
    if (thread() < 2) begin_arrivals(shared.arrivals + thread());
    meet(*this);  // nobody writes to a block that has not begun
  }

  // Calls body() for each tile of sequences of the group.
  template <class F>
  SIRE_DEVICE void each_tile(F body) {
    for (first_sequence = group * p.N; first_sequence < p.B; first_sequence += p.groups * p.N) body();
  }

  SIRE_DEVICE int passes() const { return 1 + ceil_div(p.N * (p.K - p.V), kRows); }

  SIRE_DEVICE void set_rows(int pass) {
    barrier();  // nobody needs the rows before
    if (thread() < kRows) {
      const int row = thread(), behind = p.K - p.V > 1 ? p.K - p.V : 1, dense = (pass - 1) * kRows + row;
      const int sequence = pass ? dense / behind : row / (1 + p.V);
      const int k = pass ? p.V + dense % behind : row % (1 + p.V) - 1;
      Row r{first_sequence + sequence, 0, p.T, p.T, 0, 0, false, false, false};
      const bool valid = sequence < p.N && r.b < p.B;
      r.original = valid && k < 0;
      r.variant = valid && k >= 0;
      if (r.original) r.stop = Positions::within(p.lengths[r.b], 1, p.T) - 1;
      if (r.variant) {
        r.v = r.b * p.K + k;
        const Positions at(p, r.v);
        r.i = at.i;
        r.j = at.j;
        r.stop = at.stop;
        r.moving = r.i < r.j;
        if (pass) r.origin = r.i;
      }
      shared.rows[row] = r;
    }
    barrier();
    rows = steps = 0;
    for (int row = 0; row < kRows; ++row) {
      const Row& r = shared.rows[row];
      if (r.original || r.variant) rows = row + 1;
      const int its = r.original ? p.T : r.moving ? r.stop + 1 - r.origin : 0;
      if (its > steps) steps = its;
    }
  }

  // Calls body(row, tau) for the visits of kAhead steps, that of one of them included: nobody needs those
  // before any more.
  template <class F>
  SIRE_DEVICE void each_visit(int of, F body) const {
    for (int n = thread(); n < kAhead * kRows; n += threads()) {
      const int row = n % kRows, tau = of / kAhead * kAhead + n / kRows;
      if (row < rows && tau <= steps) body(row, tau);
    }
    barrier();
  }

  // whether a row is run; in lock step a variant is also run before its swap, where it is its original
  SIRE_DEVICE static bool live(const Row& r) { return r.original || r.moving; }
  SIRE_DEVICE int64_t original_row(const Row& r, int t) const { return int64_t(t) * p.B + r.b; }
  SIRE_DEVICE int64_t span_row(const Row& r, int t) const { return r.v * p.S + t - r.i; }
  SIRE_DEVICE int64_t gates_row(const Row& r, int t) const {
    return r.original ? original_row(r, t) : int64_t(p.T) * p.B + span_row(r, t);
  }

  // state k of a row before step t, all units
  SIRE_DEVICE const float* before(const float* const* states, const float* spans, const Row& r, int t,
                                  int k) const {
    if (t > r.i) return spans + (span_row(r, t - 1) * STATES + k) * p.H;
    return t ? states[k] + original_row(r, t - 1) * p.H : p.start[k] + r.b * p.H;
  }
};

}  // namespace sire_fast::cuda
