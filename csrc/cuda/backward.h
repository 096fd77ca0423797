// The backward kernel: the same, from the last step to the first.
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
struct BackwardTile : Tile<Cell, E, true> {
  using Base = Tile<Cell, E, true>;
  using Base::after, Base::each_row, Base::get, Base::live, Base::operand, Base::original_row, Base::own,
      Base::p, Base::put, Base::rows, Base::shared, Base::span_row, Base::staged, Base::staged_state,
      Base::steps, Base::u, Base::unit, Base::visit;
  static constexpr int G = Cell::gates, STATES = Cell::states, KEPT = Cell::saved, D = Cell::gradients;
  const Backward& g;

  SIRE_DEVICE explicit BackwardTile(const Backward& g) : Base(g), g(g) {}

  // Those of an original's events, the latest first, that are at step t: the first, and how many.
  SIRE_DEVICE void find(const int64_t* times, const Row& r, int t, int& first, int& count) const {
    times += r.b * p.K;
    for (int end = p.K; first < end;) {
      const int middle = (first + end) / 2;
      if (times[middle] > t)
        first = middle + 1;
      else
        end = middle;
    }
    while (first + count < p.K && times[first + count] == t) ++count;
  }

  SIRE_DEVICE void prepare(int row, int tau) const {
    const Row& r = shared.rows[row];
    const int t = r.origin + tau, earlier = t - 1;
    auto& to = visit(tau, row) = {};
    to.running = live(r) && t <= r.stop && (r.original || t >= r.i);
    to.first = t == r.i;
    to.last = t == r.stop;
    to.at = original_row(r, t) * G * p.H;
    if (!r.original) to.at = to.first ? r.v * (D + STATES) * p.H : span_row(r, t) * D * p.H;
    if (r.original) {
      find(g.end_times, r, t, to.ended, to.ends);
      find(g.start_times, r, t, to.started, to.starts);
    }
    if (!live(r) || tau == 0 || (r.variant && earlier < r.i) || earlier > r.stop + 1) return;
    const bool running = earlier <= r.stop;
    if (running) to.gates = static_cast<const E*>(g.gates) + this->gates_row(r, earlier) * KEPT * p.H;
    SIRE_EACH (k, STATES) {
      to.before[k] = this->before(g.states, g.spans, r, earlier, k);
      if (running && r.original && g.d_states[k])
        to.incoming[k] = g.d_states[k] + original_row(r, earlier) * p.H;
    }
  }

  SIRE_DEVICE void prepare(int tau) const {
    this->each_visit(tau, [&](int row, int of) { prepare(row, of); });
  }

  // Gates of the step before tau, the states before it, and the gradients that come from outside.
  SIRE_DEVICE void fetch_before(int tau) const {
    const int buffer = (tau + 1) % 2;
    if constexpr (KEPT > 0)
      this->template fetch<KEPT>(staged(buffer, 0, 0), shared.staged_stride,
                                 [&](int row) { return visit(tau, row).gates; });
    SIRE_EACH (k, STATES) {
      this->template fetch<1>(staged_state(buffer, k, 0), shared.state_stride,
                              [&](int row) { return visit(tau, row).before[k]; });
      this->template fetch<1>(staged_state(buffer, STATES + k, 0), shared.state_stride,
                              [&](int row) { return visit(tau, row).incoming[k]; });
    }
  }

  SIRE_DEVICE void begin() {
    prepare(steps);
    fetch_before(steps);
    each_row([&](int, int, int row) {
      const Row& r = shared.rows[row];
      const int t = r.origin + steps;
      SIRE_EACH (k, STATES) {
        float s[2] = {};
        store(own(k, row), s);
        if (live(r) && t <= r.stop + 1) get(s, this->before(g.states, g.spans, r, t, k));
        store(after(k, row), s);
      }
    });
    meet(*this);
  }

  // Adds to d 2 d_penalty (h_variant - h) times sign where variant v ends, at the last row of its span.
  SIRE_DEVICE void add_pull(float (&d)[2], float sign, int64_t v, int64_t span_row,
                            const float (&h)[2]) const {
    float of_variant[2];
    get(of_variant, g.spans + span_row * STATES * p.H);
    SIRE_EACH (e, 2) d[e] += sign * 2 * g.d_penalty[v] * (of_variant[e] - h[e]);
  }

  SIRE_DEVICE void add_row(float (&to)[2], const float* row) const {
    float x[2];
    get(x, row);
    SIRE_EACH (e, 2) to[e] += x[e];
  }

  // Adds what the results at the end of a row have for gradients.
  SIRE_DEVICE void add_last(float (&d)[STATES][2], const Row& r) const {
    SIRE_EACH (k, STATES) {
      if (r.original && g.d_last[k]) add_row(d[k], g.d_last[k] + r.b * p.H);
      if (r.variant && g.d_variants[k]) add_row(d[k], g.d_variants[k] + r.v * p.H);
    }
    if (r.original || !g.d_penalty) return;
    float h[2];
    get(h, g.states[0] + original_row(r, r.stop) * p.H);
    add_pull(d[0], 1, r.v, span_row(r, r.stop), h);
  }

  // Adds the gradients of variants that end at an original's step t, behind which its h is given.
  SIRE_DEVICE void add_ends(float (&d)[STATES][2], const Row& r, int t, int first, int count,
                            const float (&h)[2]) const {
    for (int n = first; n < first + count; ++n) {
      const int64_t v = r.b * p.K + g.end_order[r.b * p.K + n];
      const Positions at(p, v);
      if (at.i < at.j) {
        if (g.d_penalty && at.i <= t && t <= at.stop) add_pull(d[0], -1, v, v * p.S + t - at.i, h);
      } else {
        SIRE_EACH (k, STATES)
          if (g.d_variants[k]) add_row(d[k], g.d_variants[k] + v * p.H);
      }
    }
  }

  // Adds what variants that start at an original's step owe to it.
  SIRE_DEVICE void add_starts(float (&du)[G][2], float (&ds)[STATES][2], const Row& r, int first,
                              int count) const {
    for (int n = first; n < first + count; ++n) {
      const int64_t v = r.b * p.K + g.start_order[r.b * p.K + n];
      const float* owed = g.d_first + v * (D + STATES) * p.H;
      SIRE_EACH (k, G) add_row(du[k], owed + k * p.H);
      SIRE_EACH (k, STATES) add_row(ds[k], owed + (D + k) * p.H);
    }
  }

  // Leaves du in the operands, and in `own` what of the gradient of the states before the step does not go
  // through the product.
  SIRE_DEVICE void step_row(int tau, int row) const {
    const int now = tau % 2;
    const Row& r = shared.rows[row];
    const auto at = visit(tau, row);
    float s[STATES][2], next[STATES][2], dx[G][2] = {}, du[G][2] = {}, ds[STATES][2] = {};
    SIRE_EACH (k, STATES) {
      load(s[k], staged_state(now, k, row) + u);
      load(next[k], after(k, row));
      store(after(k, row), s[k]);
    }
    if (at.running) {
      float d[STATES][2], kept[KEPT + 1][2];
      SIRE_EACH (k, STATES) {
        load(d[k], own(k, row));
        float incoming[2];
        load(incoming, staged_state(now, STATES + k, row) + u);
        if (r.original && g.d_states[k])
          SIRE_EACH (e, 2) d[k][e] += incoming[e];
      }
      SIRE_EACH (k, KEPT) load(kept[k], staged(now, k, row) + u);
      if (at.last) add_last(d, r);
      if (at.ends) add_ends(d, r, r.origin + tau, at.ended, at.ends, next[0]);
      SIRE_EACH (e, 2) {
        float of_d[STATES], of_s[STATES], of_next[STATES], of_kept[KEPT + 1], of_dx[G], of_du[G],
            of_ds[STATES];
        SIRE_EACH (k, STATES) of_d[k] = d[k][e], of_s[k] = s[k][e], of_next[k] = next[k][e];
        SIRE_EACH (k, KEPT) of_kept[k] = kept[k][e];
        Cell::template step_backward<Math<E>>(of_d, of_s, of_next, of_kept, of_dx, of_du, of_ds);
        SIRE_EACH (k, G) dx[k][e] = of_dx[k], du[k][e] = of_du[k];
        SIRE_EACH (k, STATES) ds[k][e] = of_ds[k];
      }
    }
    const auto put_gradients = [&](auto* rows) {
      this->template put<G>(rows, du);
      if (D > G) this->template put<1>(rows + G * p.H, &dx[G - 1]);
    };
    if (r.original) {
      this->template put<G>(static_cast<E*>(g.dx) + at.at, dx);
      if (at.starts) add_starts(du, ds, r, at.started, at.starts);
      this->template put<G>(static_cast<E*>(g.du) + at.at, du);
    } else if (at.running && at.first) {
      put_gradients(g.d_first + at.at);
      this->template put<STATES>(g.d_first + at.at + D * p.H, ds);
      SIRE_EACH (e, 2) {  // nothing goes on
        SIRE_EACH (k, G) du[k][e] = 0;
        SIRE_EACH (k, STATES) ds[k][e] = 0;
      }
    } else if (at.running) {
      put_gradients(static_cast<E*>(g.d_spans) + at.at);
    }
    SIRE_EACH (k, G) store(operand(now, k, row) + unit, du[k]);
    SIRE_EACH (k, STATES) store(own(k, row), ds[k]);
  }

  // Whether an original takes what variants have left it in a step, which are to take that step before it.
  SIRE_DEVICE bool some_start(int tau) const {
    bool some = false;
    if (shared.rows[0].original)
      for (int row = 0; row < rows; row += 1 + p.V) some = some || visit(tau, row).starts;
    return some;
  }

  SIRE_DEVICE void step(int tau) {
    const int now = tau % 2;
    if (tau % kAhead == kAhead - 1) prepare(tau);
    fetch_before(tau);
    const bool twice = some_start(tau);
    SIRE_ROLLED
    for (int turn = 0; turn <= int(twice); ++turn) {
      if (turn) this->split.splits == 1 ? warp_barrier() : barrier();
      SIRE_ROLLED
      for (int n = 0; n < 2 * kTiles; ++n) {
        const int row = this->row_of(n / 2, n % 2);
        if (this->takes(n / 2, n % 2) && row < rows && bool(visit(tau, row).starts) == bool(turn))
          step_row(tau, row);
      }
    }
    exchange(*this, now);
    Sum sums[kTiles][G] = {};
    this->multiply(now, sums);
    each_row([&](int n, int c, int row) {
      float d[2];
      load(d, own(0, row));
      SIRE_EACH (k, G)
        SIRE_EACH (e, 2) d[e] += sums[n][k][c + 2 * e];
      store(own(0, row), d);
    });
  }

  SIRE_DEVICE void run() {
    this->each_tile([&] {
      for (int pass = this->passes() - 1; pass >= 0; --pass) {
        this->set_rows(pass);
        if (!steps) continue;
        begin();
        for (int tau = steps - 1; tau >= 0; --tau) step(tau);
        finish();
      }
    });
  }

  SIRE_DEVICE void finish() const {
    each_row([&](int, int, int row) {
      const Row& r = shared.rows[row];
      if (!r.original) return;
      SIRE_EACH (k, STATES) {
        float d[2];
        load(d, own(k, row));
        this->template put<1>(g.d_start[k] + r.b * p.H, &d);
      }
    });
  }
};

template <class Cell, class E>
SIRE_KERNEL(32 * kWarps)
backward_kernel(const Backward g) {
  BackwardTile<Cell, E>(g).run();
}

}  // namespace sire_fast::cuda
