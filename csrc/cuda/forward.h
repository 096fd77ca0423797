// The forward kernel: what a thread does in each step of its tile, and around them.
#pragma once

#include <cstdint>

#include "api.h"
#include "gpu.h"
#include "group.h"
#include "layout.h"
#include "numbers.h"
#include "product.h"
#include "tile.h"

namespace sire_fast::cuda {

template <class Cell, class E>
struct ForwardTile : Tile<Cell, E, false> {
  using Base = Tile<Cell, E, false>;
  using Base::each_row, Base::live, Base::operand, Base::original_row, Base::own, Base::p, Base::put,
      Base::shared, Base::span_row, Base::staged, Base::u, Base::unit, Base::visit;
  static constexpr int G = Cell::gates, STATES = Cell::states, KEPT = Cell::saved;
  const Forward& f;

  SIRE_DEVICE explicit ForwardTile(const Forward& f) : Base(f), f(f) {}

  SIRE_DEVICE const E* inputs(const Row& r, int t) const {
    const int source = t == r.i ? r.j : t == r.j ? r.i : t;
    if (!live(r) || t > r.stop) return nullptr;
    return static_cast<const E*>(p.x) + original_row(r, source) * G * p.H;
  }

  SIRE_DEVICE void prepare(int row, int tau) const {
    const Row& r = shared.rows[row];
    const int t = r.origin + tau;
    const bool running = live(r) && t <= r.stop, in_span = running && t >= r.i;
    auto& to = visit(tau, row) = {running, {}, {}, nullptr, inputs(r, t + 1)};
    SIRE_EACH (k, STATES) {
      if (r.original) to.states[k] = f.states[k] + original_row(r, t) * p.H;
      if (in_span && f.spans) to.states[k] = f.spans + (span_row(r, t) * STATES + k) * p.H;
      if (in_span && t == r.stop) to.ended[k] = f.variants[k] + r.v * p.H;
    }
    if (f.gates && (in_span || (r.original && running)))
      to.gates = static_cast<E*>(f.gates) + this->gates_row(r, t) * KEPT * p.H;
  }

  template <class Source>
  SIRE_DEVICE void fetch_inputs(int buffer, Source source) const {
    this->template fetch<G>(staged(buffer, 0, 0), shared.staged_stride, source);
  }

  SIRE_DEVICE void begin() {
    fetch_inputs(0, [&](int row) { return inputs(shared.rows[row], shared.rows[row].origin); });
    each_row([&](int, int, int row) {
      const Row& r = shared.rows[row];
      SIRE_EACH (k, STATES) {
        float s[2] = {};
        if (live(r)) this->get(s, this->before(f.states, nullptr, r, r.origin, k));
        store(own(k, row), s);
        if (k == 0) store(operand(0, 0, row) + unit, s);
      }
    });
    exchange(*this, 0);
  }

  SIRE_DEVICE void step(int tau, const float (&bias)[2][G]) {
    const int now = tau % 2;
    if (tau % kAhead == 0) this->each_visit(tau, [&](int row, int of) { prepare(row, of); });
    fetch_inputs(1 - now, [&](int row) { return visit(tau, row).inputs; });
    Sum sums[kTiles][G];
    SIRE_EACH (n, kTiles)
      SIRE_EACH (g, G)
        SIRE_EACH (e, 4) sums[n][g][e] = bias[e / 2][g];
    this->multiply(now, sums);
    each_row([&](int n, int c, int row) {
      const auto at = visit(tau, row);
      float s[STATES][2];
      SIRE_EACH (k, STATES) load(s[k], own(k, row));
      if (at.running) {
        float x[G][2], kept[KEPT + 1][2];
        SIRE_EACH (g, G) load(x[g], staged(now, g, row) + u);
        SIRE_EACH (e, 2) {
          float of_x[G], of_u[G], of_s[STATES], next[STATES], of_kept[KEPT + 1];
          SIRE_EACH (g, G) of_x[g] = x[g][e], of_u[g] = sums[n][g][c + 2 * e];
          SIRE_EACH (k, STATES) of_s[k] = s[k][e];
          Cell::template step<Math<E>>(of_x, of_u, of_s, next, of_kept);
          SIRE_EACH (k, STATES) s[k][e] = next[k];
          SIRE_EACH (k, KEPT) kept[k][e] = of_kept[k];
        }
        SIRE_EACH (k, STATES) store(own(k, row), s[k]);
        if (at.gates) this->template put<KEPT>(at.gates, kept);
        if (at.ended[0])
          SIRE_EACH (k, STATES) this->template put<1>(at.ended[k], &s[k]);
      }
      store(operand(1 - now, 0, row) + unit, s[0]);
      if (at.states[0])
        SIRE_EACH (k, STATES) {
          if (!at.running) s[k][0] = s[k][1] = 0;
          this->template put<1>(at.states[k], &s[k]);
        }
    });
    exchange(*this, 1 - now);
  }

  // The last states, those of variants that exchange nothing, and the penalties.
  SIRE_DEVICE void finish() const {
    each_row([&](int, int, int row) {
      const Row& r = shared.rows[row];
      SIRE_EACH (k, STATES) {
        float s[2];
        if (r.original) {
          load(s, own(k, row));
          this->template put<1>(f.last[k] + r.b * p.H, &s);
        } else if (r.variant && !r.moving) {
          this->get(s, f.states[k] + original_row(r, r.stop) * p.H);
          this->template put<1>(f.variants[k] + r.v * p.H, &s);
        }
      }
    });
    if (this->rank) return;
    for (int row = this->warp; row < kRows; row += threads() / 32) {
      const Row& r = shared.rows[row];
      if (!r.variant) continue;
      float total = 0;
      if (r.moving)
        for (int n = this->lane; n < p.H; n += 32) {
          const float d = f.variants[0][r.v * p.H + n] - f.states[0][original_row(r, r.stop) * p.H + n];
          total += d * d;
        }
      total = warp_sum(total);
      if (!this->lane) f.penalty[r.v] = total;
    }
  }

  SIRE_DEVICE void run() {
    float bias[2][G];
    SIRE_EACH (e, 2)
      SIRE_EACH (g, G) {
        const bool has = p.b_hh && !this->part && unit + e < p.H;
        bias[e][g] = has ? float(static_cast<const E*>(p.b_hh)[g * p.H + unit + e]) : 0;
      }
    this->each_tile([&] {
      for (int pass = 0; pass < this->passes(); ++pass) {
        this->set_rows(pass);
        begin();
        for (int tau = 0; tau < this->steps; ++tau) step(tau, bias);
        meet(*this);  // all blocks' states are there
        finish();
      }
    });
  }
};

template <class Cell, class E>
SIRE_KERNEL(32 * kWarps)
forward_kernel(const Forward f) {
  ForwardTile<Cell, E>(f).run();
}

}  // namespace sire_fast::cuda
