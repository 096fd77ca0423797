// The kernel behind the backward: what variants owe to the inputs that they have read.
#pragma once

#include <cstdint>

#include "api.h"
#include "gpu.h"
#include "layout.h"

namespace sire_fast::cuda {

constexpr int kGatherThreads = 128;

// A block for each row of dx.
template <class Cell, class E>
SIRE_KERNEL(kGatherThreads)
gather_kernel(const Gather call) {
  constexpr int G = Cell::gates, D = Cell::gradients, WIDTH = D + Cell::states;
  const int64_t row = block();
  const int t = int(row / call.B), b = int(row % call.B);
  for (int unit = thread(); unit < call.H; unit += threads()) {
    float total[G];
    E* dx = static_cast<E*>(call.dx) + row * G * call.H + unit;
    SIRE_EACH (g, G) total[g] = float(dx[g * call.H]);
    for (int64_t v = int64_t(b) * call.K; v < int64_t(b + 1) * call.K; ++v) {
      const Positions at(call, v);
      const int i = at.i, j = at.j;
      if (i == j || t < i || t > at.stop) continue;
      const int step = (t == i ? j : t == j ? i : t) - i;  // of the span, that has read this input
      const auto owed = [&](int g) {
        const int column = (g < G - 1 ? g : D - 1) * call.H + unit;
        if (!step) return call.d_first[v * WIDTH * call.H + column];
        return float(static_cast<const E*>(call.d_spans)[(v * call.S + step) * D * call.H + column]);
      };
      SIRE_EACH (g, G) total[g] += owed(g);
    }
    SIRE_EACH (g, G) dx[g * call.H] = E(total[g]);
  }
}

}  // namespace sire_fast::cuda
