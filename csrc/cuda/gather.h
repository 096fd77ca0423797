// The kernel behind the backward: what variants owe to the inputs that they have read, and zeros for the
// products behind it.
#pragma once

#include <cstdint>

#include "api.h"
#include "gpu.h"
#include "layout.h"

namespace sire_fast::cuda {

constexpr int kGatherThreads = 128;

// Rows first to end of so many values, each `stride` behind the last, become 0: a warp for each.
template <class V>
SIRE_DEVICE void clear(V* rows, int first, int end, int stride, int width) {
  for (int row = first + thread() / 32; row < end; row += threads() / 32)
    for (int at = thread() % 32; at < width; at += 32) rows[int64_t(row) * stride + at] = V(0.0f);
}

// dW_hh is a product over all rows of spans: nobody has written those behind a variant's last step, and its
// first step stands in its original's.
template <class Cell, class E>
SIRE_DEVICE void clear_outside(const Gather& call, int64_t v) {
  constexpr int D = Cell::gradients, STATES = Cell::states;
  const Positions at(call, v);
  const int H = call.H, end = at.i < at.j ? at.stop - at.i + 1 : 0;
  E* d_span = static_cast<E*>(call.d_spans) + v * call.S * D * H;
  clear(d_span, 0, 1, D * H, Cell::gates * H);
  clear(d_span, end, call.S, D * H, Cell::gates * H);
  clear(call.spans + v * call.S * STATES * H, end, call.S, STATES * H, H);
}

// Row (t, b) of dx, at b + t * B.
template <class Cell, class E>
SIRE_DEVICE void add_owed(const Gather& call, int64_t row) {
  constexpr int G = Cell::gates, D = Cell::gradients, WIDTH = D + Cell::states;
  const int t = int(row / call.B);
  const int64_t variants = row % call.B * call.K;  // of the sequence, the first
  for (int first = 0; first < call.H; first += threads()) {
    const int unit = first + thread();
    const bool there = unit < call.H;
    float total[G] = {};
    E* dx = static_cast<E*>(call.dx) + row * G * call.H + unit;
    if (there)
      SIRE_EACH (g, G) total[g] = float(dx[g * call.H]);
    for (int some = 0; some < call.K; some += 32) {  // of which each lane of a warp looks at one
      bool has_read = false;
      if (some + thread() % 32 < call.K) {
        const Positions at(call, variants + some + thread() % 32);
        has_read = at.i < at.j && at.i <= t && t <= at.stop;
      }
      for (uint32_t left = ballot(has_read); left; left &= left - 1) {
        const int64_t v = variants + some + first_bit(left);
        const Positions at(call, v);
        const int step = (t == at.i ? at.j : t == at.j ? at.i : t) - at.i;  // of the span
        const auto owed = [&](int g) {
          const int column = (g < G - 1 ? g : D - 1) * call.H + unit;
          if (!step) return call.d_first[v * WIDTH * call.H + column];
          return float(static_cast<const E*>(call.d_spans)[(v * call.S + step) * D * call.H + column]);
        };
        if (there)
          SIRE_EACH (g, G) total[g] += owed(g);
      }
    }
    if (there)
      SIRE_EACH (g, G) dx[g * call.H] = E(total[g]);
  }
}

// A block for each variant, and for each row of dx.
template <class Cell, class E>
SIRE_KERNEL(kGatherThreads)
gather_kernel(const Gather call) {
  const int64_t row = block() - int64_t(call.B) * call.K;
  if (row < 0)
    clear_outside<Cell, E>(call, block());
  else
    add_owed<Cell, E>(call, row);
}

}  // namespace sire_fast::cuda
