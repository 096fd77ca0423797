// Persistent kernels: W_hh stays in registers for all steps, the states go through shared memory once a step.
//
// A warp has 16 units, all of their gates, and of the sum over h up to kSlots tiles; where H is larger,
// several warps share the units, and several blocks, a group, the tile. The gates of a unit for a row meet in
// one thread, which takes the cell's step for it: the only exchange in a step is that of the new states
// (backward: of the gates' gradients) between the blocks of the group. One barrier of the group a step.
#ifdef __CUDACC__
#include "gpu.h"
#else
#include "gpu_on_host.h"
#endif

#include "cells.h"
#include "cuda.h"

namespace sire_fast::cuda {
namespace {

using namespace gpu;

constexpr int kTile = 8;  // rows of a product on the matrix unit
constexpr int kTiles = kRows / kTile;
constexpr int kUnits = 16;     // units of a warp
constexpr int kTileWords = 8;  // 32-bit words of a tile of the sum
constexpr int kSlots = 8;      // tiles of the sum of which a warp holds weights
constexpr int kWarps = 8;      // of a block, at most

struct Math {
  using V = float;
  static SIRE_DEVICE float sigmoid(float x) { return reciprocal(1 + gpu::exp(-x)); }
  static SIRE_DEVICE float tanh(float x) { return gpu::tanh(x); }
  static SIRE_DEVICE float relu(float x) { return x < 0 ? 0 : x; }  // a NaN stays one
  static SIRE_DEVICE float positive(float condition, float value) { return condition <= 0 ? 0 : value; }
};

// How many factors of a product a word holds.
template <class E>
constexpr int kFactors = 4 / int(sizeof(E));

SIRE_DEVICE uint32_t word(const float (&x)[1], float) { return bits(x[0]); }
template <class E>
SIRE_DEVICE uint32_t word(const float (&x)[2], E) {
  const E low(x[0]), high(x[1]);
  return bits(low) | bits(high) << 16;
}

SIRE_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How the units of a layer and the sum over them are split.
struct Split {
  int tiles;   // of kUnits units, of a block
  int sum;     // tiles of the sum
  int splits;  // of the sum, between warps
  SIRE_HOST_DEVICE Split(int H, int blocks, int factors)
      : tiles(ceil_div(ceil_div(H, kUnits), blocks)),
        sum(ceil_div(H, kTileWords * factors)),
        splits(ceil_div(sum, kSlots)) {}
  SIRE_HOST_DEVICE int warps() const { return tiles * splits; }
  SIRE_HOST_DEVICE int units() const { return kUnits * tiles; }
};

struct Row {
  int64_t b, v;                    // sequence, variant
  int i, j;                        // positions that a variant exchanges; T for an original
  int origin;                      // where its pass begins
  int stop;                        // its last step
  bool original, variant, moving;  // moving: a variant that is run
};

// Where an original is in the lists of its variants' ends and starts.
struct Cursor {
  int n_ended, n_started;
  int end, start;  // the next ones
};

// A block's shared memory. Rows of values have 16 bytes more than they need, so that rows start in different
// banks.
template <class Cell, class E, bool kBackward>
struct Shared {
  static constexpr int kOperands = kBackward ? Cell::gates : 1;  // factors of a row: of each gate, or h
  static constexpr int kStaged = kBackward ? Cell::saved : Cell::gates;
  static constexpr int kStagedStates = kBackward ? 2 * Cell::states : 0;  // s, d_states

  // of operands: a block that nobody writes to needs no second one if the warps wait for each other's parts
  // of the sum, and with that for the reading of the first
  int buffers;
  int operand_stride, staged_stride, state_stride;  // of rows
  Row* rows;                                        // (kRows)
  Cursor* cursors;                                  // (tiles, kRows)
  float* sums;           // (splits - 1, tiles, gates, kTiles, 4, 32), what other warps have summed
  float* own;            // (states, kRows, units), states, or their gradients
  float* after;          // backward: (states, kRows, units), states after the step
  E* operand;            // (buffers, kOperands, kRows, all units), factors of the product
  E* staged;             // (2, kStaged, kRows, units), inputs or gates of a step
  float* staged_states;  // (2, kStagedStates, kRows, units)
  int64_t bytes;

  SIRE_HOST_DEVICE Shared(char* memory, const Split& split, int blocks, bool mailbox) {
    char* at = memory;
    const auto take = [&](auto*& p, int64_t n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at);
      at += (n * int64_t(sizeof *p) + 15) / 16 * 16;
    };
    const int padding = 16 / int(sizeof(E));
    buffers = mailbox && split.splits > 1 ? 1 : 2;
    operand_stride = blocks * split.units() + padding;
    staged_stride = split.units() + padding;
    state_stride = split.units() + 4;
    take(rows, kRows);
    take(cursors, kBackward ? split.tiles * kRows : 0);
    take(sums, int64_t(split.splits - 1) * split.tiles * Cell::gates * kTiles * 128);
    take(own, Cell::states * kRows * state_stride);
    take(after, kBackward ? Cell::states * kRows * state_stride : 0);
    take(operand, buffers * kOperands * kRows * operand_stride);
    take(staged, 2 * kStaged * kRows * staged_stride);
    take(staged_states, 2 * kStagedStates * kRows * state_stride);
    bytes = at - memory;
  }
};

// A barrier of a group that is no cluster, its `count`th.
SIRE_DEVICE void group_barrier(uint32_t* arrived, int rank, int blocks, uint32_t count) {
  barrier();
  if (!thread()) publish(arrived + rank, count);
  for (int n = thread(); n < blocks; n += threads()) wait_for(arrived + n, count);
  barrier();
}

using Sum = float[4];  // a thread's part of a product: two rows of each of two units

// A thread's view of the tile that its block works on.
template <class Cell, class E, bool kBackward>
struct Tile {
  static constexpr int G = Cell::gates, STATES = Cell::states;
  const Pass& p;
  const Split split;
  const Shared<Cell, E, kBackward> shared;
  const int group, rank;
  const int unit0;                   // of the block
  const int warp, lane, tile, part;  // tile of units and part of the sum of this warp
  uint32_t w[G][kSlots][4];          // W_hh, transposed in the backward
  int first_sequence;                // of the rows
  uint32_t exchanges = 0;            // through the mailbox

  SIRE_DEVICE explicit Tile(const Pass& p)
      : p(p),
        split(p.H, p.blocks, kFactors<E>),
        shared(shared_memory(), split, p.blocks, p.mailbox),
        group(block() / p.blocks),
        rank(block() % p.blocks),
        unit0(rank * split.units()),
        warp(thread() / 32),
        lane(thread() % 32),
        tile(warp % split.tiles),
        part(warp / split.tiles) {
    SIRE_EACH (g, G)
      SIRE_EACH (slot, kSlots)
        SIRE_EACH (r, 4) w[g][slot][r] = weight(g, slot, r);
    meet();  // nobody writes to a block that has not begun
  }

  // Calls body() for each tile of sequences of the group.
  template <class F>
  SIRE_DEVICE void each_tile(F body) {
    for (first_sequence = group * p.N; first_sequence < p.B; first_sequence += p.groups * p.N) body();
  }

  SIRE_DEVICE uint32_t weight(int g, int slot, int r) const {
    const int unit = unit0 + tile * kUnits + lane / 4 + r % 2 * 8;
    const int first = ((part * kSlots + slot) * kTileWords + lane % 4 + r / 2 * 4) * kFactors<E>;
    const auto* w_hh = static_cast<const E*>(p.w_hh) + int64_t(g) * p.H * p.H;
    float factors[kFactors<E>];
    SIRE_EACH (n, kFactors<E>) {
      const int k = first + n;
      const int64_t at = kBackward ? int64_t(k) * p.H + unit : int64_t(unit) * p.H + k;
      factors[n] = unit < p.H && k < p.H ? float(w_hh[at]) : 0;
    }
    return word(factors, E());
  }

  // Calls body(n, e, row, u) for this thread's rows and units unit0 + u, whose sums are those at [n][..][e].
  template <class F>
  SIRE_DEVICE void each(F body) const {
    SIRE_EACH (n, kTiles) each_of(n, body);
  }
  template <class F>
  SIRE_DEVICE void each_of(int n, F body) const {
    SIRE_EACH (e, 4) body(n, e, n * kTile + lane % 4 * 2 + e % 2, tile * kUnits + lane / 4 + e / 2 * 8);
  }

  // ---------------------------------------------------------------- rows

  SIRE_DEVICE int passes() const { return 1 + ceil_div(p.N * (p.K - p.V), kRows); }

  SIRE_DEVICE void set_rows(int pass) const {
    barrier();  // nobody needs the rows before
    if (thread() < kRows) {
      const int row = thread(), behind = p.K - p.V > 1 ? p.K - p.V : 1, dense = (pass - 1) * kRows + row;
      const int sequence = pass ? dense / behind : row / (1 + p.V);
      const int k = pass ? p.V + dense % behind : row % (1 + p.V) - 1;
      Row r{first_sequence + sequence, 0, p.T, p.T, 0, 0, false, false, false};
      const bool valid = sequence < p.N && r.b < p.B;
      r.original = valid && k < 0;
      r.variant = valid && k >= 0;
      if (r.original) r.stop = int(p.lengths[r.b]) - 1;
      if (r.variant) {
        r.v = r.b * p.K + k;
        r.i = int(p.swaps[2 * r.v]);
        r.j = int(p.swaps[2 * r.v + 1]);
        r.stop = int(p.ends[r.v]);
        r.moving = r.i < r.j;
        if (pass) r.origin = r.i;
      }
      shared.rows[row] = r;
    }
    barrier();
  }

  SIRE_DEVICE int steps(int pass) const {
    if (!pass) return p.T;
    int longest = 0;
    for (int row = 0; row < kRows; ++row) {
      const Row& r = shared.rows[row];
      if (r.moving && r.stop - r.i + 1 > longest) longest = r.stop - r.i + 1;
    }
    return longest;
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

  SIRE_DEVICE float& own(int k, int row, int u) const {
    return shared.own[(k * kRows + row) * shared.state_stride + u];
  }
  SIRE_DEVICE float& after(int k, int row, int u) const {
    return shared.after[(k * kRows + row) * shared.state_stride + u];
  }
  SIRE_DEVICE E& staged(int buffer, int field, int row, int u) const {
    return shared.staged[((buffer * shared.kStaged + field) * kRows + row) * shared.staged_stride + u];
  }
  SIRE_DEVICE float& staged_state(int buffer, int field, int row, int u) const {
    return shared
        .staged_states[((buffer * shared.kStagedStates + field) * kRows + row) * shared.state_stride + u];
  }
  // factors of a row of a product, for the units of all blocks
  SIRE_DEVICE E* operand(int buffer, int field, int row) const {
    const int at = shared.buffers > 1 ? buffer : 0;
    return shared.operand + ((at * shared.kOperands + field) * kRows + row) * shared.operand_stride;
  }

  // Starts to copy, for each row, this block's units of source(row), of H values, or zeros if that is null.
  template <class V, class Source>
  SIRE_DEVICE void fetch(V* to, int stride, Source source) const {
    constexpr int kPiece = 16 / int(sizeof(V));
    const int pieces = split.units() / kPiece;
    for (int n = thread(); n < kRows * pieces; n += threads()) {
      const int row = n / pieces, u = n % pieces * kPiece;
      const V* from = source(row);
      if (from) from += unit0 + u;
      V* at = to + row * stride + u;
      if (from && unit0 + u + kPiece <= p.H && reinterpret_cast<uintptr_t>(from) % 16 == 0)
        copy_async(at, from);
      else
        for (int k = 0; k < kPiece; ++k) at[k] = from && unit0 + u + k < p.H ? from[k] : V(0.0f);
    }
  }

  // ---------------------------------------------------------------- product

  // Adds the product of W_hh, or its transpose, with the operands to sums; those of the whole sum are the
  // warps' of part 0.
  SIRE_DEVICE void multiply(int buffer, Sum (&sums)[kTiles][G]) const {
    const int q = lane % 4;
    SIRE_EACH (slot, kSlots) {
      const int k = part * kSlots + slot;
      if (k >= split.sum) break;
      SIRE_EACH (n, kTiles)
        SIRE_EACH (field, shared.kOperands) {
          const auto* words = reinterpret_cast<const uint32_t*>(operand(buffer, field, n * kTile + lane / 4));
          const uint32_t b[2] = {words[k * kTileWords + q], words[k * kTileWords + q + 4]};
          if constexpr (kBackward)
            add(sums[n][field], w[field][slot], b);
          else
            SIRE_EACH (g, G) add(sums[n][g], w[g][slot], b);
        }
    }
    if (split.splits == 1) return;
    const auto sum = [&](int of, int g, int n, int e) -> float& {
      return shared.sums[((((of - 1) * split.tiles + tile) * G + g) * kTiles + n) * 128 + e * 32 + lane];
    };
    const auto each_sum = [&](auto body) {
      SIRE_EACH (n, kTiles)
        SIRE_EACH (g, G)
          SIRE_EACH (e, 4) body(sums[n][g][e], g, n, e);
    };
    if (part) each_sum([&](float& x, int g, int n, int e) { sum(part, g, n, e) = x; });
    barrier();
    if (!part)
      for (int of = 1; of < split.splits; ++of)
        each_sum([&](float& x, int g, int n, int e) { x += sum(of, g, n, e); });
  }

  // Adds one tile's product. A float32 is the sum of two TF32 numbers, of which the product of the small ones
  // is left out; the matrix unit cuts its sums off, so that these begin at 0 in each tile and are added with
  // rounding.
  SIRE_DEVICE void add(Sum& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    if constexpr (sizeof(E) == 4) {
      uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
      halve(a, high_a, low_a);
      halve(b, high_b, low_b);
      Sum of_tile = {};
      if (!p.tf32) {
        mma(of_tile, low_a, high_b, E());
        mma(of_tile, high_a, low_b, E());
      }
      mma(of_tile, high_a, high_b, E());
      SIRE_EACH (e, 4) sum[e] += of_tile[e];
    } else {
      mma(sum, a, b, E());
    }
  }

  template <int N>
  SIRE_DEVICE static void halve(const uint32_t (&x)[N], uint32_t (&high)[N], uint32_t (&low)[N]) {
    SIRE_EACH (n, N) {
      const float rounded = to_tf32(from_bits(x[n]));
      high[n] = bits(rounded);
      low[n] = bits(to_tf32(from_bits(x[n]) - rounded));
    }
  }

  // What was fetched has come, and nobody of the cluster is behind.
  SIRE_DEVICE void meet() const {
    wait_for_copies();
    barrier();
    if (p.blocks > 1 && !p.mailbox) cluster_barrier();
  }

  // Calls body(rank, row, u) for pieces of 16 bytes of the operands of the blocks that follow this one by
  // first to last - 1: those of its units from u on.
  template <class F>
  SIRE_DEVICE void each_piece(int first, int last, F body) const {
    constexpr int kPiece = 16 / int(sizeof(E));
    const int pieces = split.units() / kPiece, of_block = shared.kOperands * kRows * pieces;
    for (int n = first * of_block + thread(); n < last * of_block; n += threads())
      body((rank + n / of_block) % p.blocks, n % of_block / pieces, n % pieces * kPiece);
  }

  // Ends a step: as `meet`, and the operands of all blocks have come to this one.
  SIRE_DEVICE void exchange(int buffer) {
    const auto in_shared = [&](int rank, int row, int u) {
      return reinterpret_cast<uint4*>(operand(buffer, 0, row) + rank * split.units() + u);
    };
    if (p.blocks > 1) barrier();
    if (p.mailbox) {
      const int width = p.blocks * split.units(), half = shared.kOperands * kRows * width;
      E* mailbox = static_cast<E*>(p.mailbox) + (group * 2 + exchanges % 2) * half;
      const auto in_mailbox = [&](int rank, int row, int u) {
        return reinterpret_cast<uint4*>(mailbox + row * width + rank * split.units() + u);
      };
      each_piece(0, 1,
                 [&](int rank, int row, int u) { *in_mailbox(rank, row, u) = *in_shared(rank, row, u); });
      group_barrier(p.arrived + group * p.blocks, rank, p.blocks, ++exchanges);
      each_piece(1, p.blocks, [&](int rank, int row, int u) {
        copy_async(in_shared(rank, row, u), in_mailbox(rank, row, u));
      });
    } else {
      each_piece(1, p.blocks, [&](int peer, int row, int u) {
        uint4* at = in_shared(rank, row, u);
        store_to_peer(at, peer, *at);
      });
    }
    meet();
  }
};

// ------------------------------------------------------------------ forward

template <class Cell, class E>
struct ForwardTile : Tile<Cell, E, false> {
  using Base = Tile<Cell, E, false>;
  using Base::each, Base::exchange, Base::fetch, Base::live, Base::operand, Base::own, Base::p, Base::shared,
      Base::staged, Base::unit0;
  static constexpr int G = Cell::gates, STATES = Cell::states, KEPT = Cell::saved;
  const Forward& f;

  SIRE_DEVICE explicit ForwardTile(const Forward& f) : Base(f), f(f) {}

  SIRE_DEVICE void fetch_inputs(int buffer, int tau) const {
    SIRE_EACH (g, G)
      fetch(&staged(buffer, g, 0, 0), shared.staged_stride, [&](int row) -> const E* {
        const Row& r = shared.rows[row];
        const int t = r.origin + tau, source = t == r.i ? r.j : t == r.j ? r.i : t;
        if (!live(r) || t > r.stop) return nullptr;
        return static_cast<const E*>(p.x) + (this->original_row(r, source) * G + g) * p.H;
      });
  }

  SIRE_DEVICE void begin() {
    if (!this->part)
      each([&](int, int, int row, int u) {
        const Row& r = shared.rows[row];
        const int unit = unit0 + u;
        SIRE_EACH (k, STATES)
          own(k, row, u) = live(r) && unit < p.H ? this->before(f.states, nullptr, r, r.origin, k)[unit] : 0;
        operand(0, 0, row)[unit] = E(own(0, row, u));
      });
    fetch_inputs(0, 0);
    exchange(0);
  }

  // What a row's step leaves in memory.
  SIRE_DEVICE void store(const Row& r, int t, int unit, const float* next, const float* kept) const {
    const bool running = t <= r.stop, in_span = running && t >= r.i;
    if (r.original)
      SIRE_EACH (k, STATES) f.states[k][this->original_row(r, t) * p.H + unit] = running ? next[k] : 0;
    if (in_span)
      SIRE_EACH (k, STATES) {
        if (f.spans) f.spans[(this->span_row(r, t) * STATES + k) * p.H + unit] = next[k];
        if (t == r.stop) f.variants[k][r.v * p.H + unit] = next[k];
      }
    if (f.gates && (in_span || (r.original && running)))
      SIRE_EACH (k, KEPT)
        static_cast<E*>(f.gates)[(this->gates_row(r, t) * KEPT + k) * p.H + unit] = E(kept[k]);
  }

  SIRE_DEVICE void step(int tau, const float (&bias)[2][G]) {
    const int now = tau % 2;
    fetch_inputs(1 - now, tau + 1);
    Sum u[kTiles][G];
    SIRE_EACH (n, kTiles)
      SIRE_EACH (g, G)
        SIRE_EACH (e, 4) u[n][g][e] = bias[e / 2][g];
    this->multiply(now, u);
    if (!this->part)
      each([&](int n, int e, int row, int local) {
        const Row& r = shared.rows[row];
        const int t = r.origin + tau, unit = unit0 + local;
        float x[G], v[G], s[STATES], next[STATES], kept[KEPT + 1];
        SIRE_EACH (g, G) {
          x[g] = float(staged(now, g, row, local));
          v[g] = u[n][g][e];
        }
        SIRE_EACH (k, STATES) s[k] = own(k, row, local);
        Cell::template step<Math>(x, v, s, next, kept);
        if (live(r) && unit < p.H) store(r, t, unit, next, kept);
        if (live(r) && t <= r.stop)
          SIRE_EACH (k, STATES) own(k, row, local) = s[k] = next[k];
        operand(1 - now, 0, row)[unit] = E(s[0]);
      });
    exchange(1 - now);
  }

  // The last states, those of variants that exchange nothing, and the penalties.
  SIRE_DEVICE void finish() const {
    if (!this->part)
      each([&](int, int, int row, int u) {
        const Row& r = shared.rows[row];
        const int unit = unit0 + u;
        if (unit >= p.H) return;
        SIRE_EACH (k, STATES) {
          if (r.original) f.last[k][r.b * p.H + unit] = own(k, row, u);
          if (r.variant && !r.moving)
            f.variants[k][r.v * p.H + unit] = f.states[k][this->original_row(r, r.stop) * p.H + unit];
        }
      });
    if (this->rank) return;  // the barrier of the last step is behind all blocks' states
    for (int row = this->warp; row < kRows; row += threads() / 32) {
      const Row& r = shared.rows[row];
      if (!r.variant) continue;
      float total = 0;
      if (r.moving)
        for (int unit = this->lane; unit < p.H; unit += 32) {
          const float d =
              f.variants[0][r.v * p.H + unit] - f.states[0][this->original_row(r, r.stop) * p.H + unit];
          total += d * d;
        }
      total = warp_sum(total);
      if (!this->lane) f.penalty[r.v] = total;
    }
  }

  SIRE_DEVICE void run() {
    float bias[2][G];
    SIRE_EACH (half, 2)
      SIRE_EACH (g, G) {
        const int unit = unit0 + this->tile * kUnits + this->lane / 4 + half * 8;
        const bool has = p.b_hh && !this->part && unit < p.H;
        bias[half][g] = has ? float(static_cast<const E*>(p.b_hh)[g * p.H + unit]) : 0;
      }
    this->each_tile([&] {
      for (int pass = 0; pass < this->passes(); ++pass) {
        this->set_rows(pass);
        const int steps = this->steps(pass);
        begin();
        for (int tau = 0; tau < steps; ++tau) step(tau, bias);
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

// ------------------------------------------------------------------ backward

template <class Cell, class E>
struct BackwardTile : Tile<Cell, E, true> {
  using Base = Tile<Cell, E, true>;
  using Base::after, Base::each, Base::exchange, Base::fetch, Base::live, Base::operand, Base::own, Base::p,
      Base::shared, Base::staged, Base::staged_state, Base::unit0;
  static constexpr int G = Cell::gates, STATES = Cell::states, KEPT = Cell::saved, D = Cell::gradients;
  const Backward& g;

  SIRE_DEVICE explicit BackwardTile(const Backward& g) : Base(g), g(g) {}

  // Gates of step t, the states before it, and the gradients that come from outside.
  SIRE_DEVICE void fetch_step(int buffer, int tau) const {
    const auto of_row = [&](int row, auto inside) {
      const Row& r = shared.rows[row];
      const int t = r.origin + tau;
      using Pointer = decltype(inside(r, t));
      return live(r) && tau >= 0 && (r.original || t >= r.i) ? inside(r, t) : Pointer(nullptr);
    };
    SIRE_EACH (k, KEPT)
      fetch(&staged(buffer, k, 0, 0), shared.staged_stride, [&](int row) {
        return of_row(row, [&](const Row& r, int t) -> const E* {
          if (t > r.stop) return nullptr;
          return static_cast<const E*>(g.gates) + (this->gates_row(r, t) * KEPT + k) * p.H;
        });
      });
    SIRE_EACH (k, STATES) {
      fetch(&staged_state(buffer, k, 0, 0), shared.state_stride, [&](int row) {
        return of_row(row, [&](const Row& r, int t) -> const float* {
          return t > r.stop + 1 ? nullptr : this->before(g.states, g.spans, r, t, k);
        });
      });
      fetch(&staged_state(buffer, STATES + k, 0, 0), shared.state_stride, [&](int row) {
        return of_row(row, [&](const Row& r, int t) -> const float* {
          const bool has = g.d_states[k] && r.original && t <= r.stop;
          return has ? g.d_states[k] + this->original_row(r, t) * p.H : nullptr;
        });
      });
    }
  }

  SIRE_DEVICE void begin(int steps) {
    if (!this->part)
      each([&](int, int, int row, int u) {
        const Row& r = shared.rows[row];
        const int t = r.origin + steps, unit = unit0 + u;
        const bool known = live(r) && unit < p.H && t <= r.stop + 1;
        SIRE_EACH (k, STATES) {
          own(k, row, u) = 0;
          after(k, row, u) = known ? this->before(g.states, g.spans, r, t, k)[unit] : 0;
        }
      });
    if (this->part == 0 && this->lane < kRows) {
      const Row& r = shared.rows[this->lane];
      cursor(this->lane) = {0, 0, next(r, g.end_times, 0), next(r, g.start_times, 0)};
    }
    fetch_step((steps - 1) % 2, steps - 1);
    this->meet();
  }

  SIRE_DEVICE Cursor& cursor(int row) const { return shared.cursors[this->tile * kRows + row]; }
  SIRE_DEVICE int next(const Row& r, const int64_t* times, int n) const {
    return r.original && n < p.K ? int(times[r.b * p.K + n]) : -1;
  }

  // 2 d_penalty (h_variant - h) where variant v ends, at the last row of its span
  SIRE_DEVICE float pull(int64_t v, int64_t span_row, float h, int unit) const {
    return 2 * g.d_penalty[v] * (g.spans[span_row * STATES * p.H + unit] - h);
  }

  // Adds the gradients of variants that end at an original's step.
  SIRE_DEVICE void add_ends(const Row& r, int t, int unit, const Cursor& at, float h, float* d) const {
    for (int n = at.n_ended, when = at.end; when == t; when = next(r, g.end_times, ++n)) {
      const int64_t v = r.b * p.K + g.end_order[r.b * p.K + n];
      const int64_t i = g.swaps[2 * v];
      if (i < g.swaps[2 * v + 1]) {
        if (g.d_penalty) d[0] -= pull(v, v * p.S + t - i, h, unit);
      } else {
        SIRE_EACH (k, STATES)
          if (g.d_variants[k]) d[k] += g.d_variants[k][v * p.H + unit];
      }
    }
  }

  // Adds what variants that start at an original's step owe to it.
  SIRE_DEVICE void add_starts(const Row& r, int t, int unit, const Cursor& at, float* du, float* ds) const {
    for (int n = at.n_started, when = at.start; when == t; when = next(r, g.start_times, ++n)) {
      const float* owed = first(r.b * p.K + g.start_order[r.b * p.K + n], unit);
      SIRE_EACH (k, G) du[k] += owed[k * p.H];
      SIRE_EACH (k, STATES) ds[k] += owed[(D + k) * p.H];
    }
  }

  SIRE_DEVICE float* first(int64_t v, int unit) const { return g.d_first + v * (D + STATES) * p.H + unit; }

  // A row's step for one unit: leaves du in the operands, and in `own` what of the gradient of the states
  // before it does not go through the product.
  SIRE_DEVICE void step_unit(int now, int tau, int row, int u) const {
    const Row& r = shared.rows[row];
    const int t = r.origin + tau, unit = unit0 + u;
    const bool running = live(r) && t <= r.stop && (r.original || t >= r.i) && unit < p.H;
    const bool starts = !r.original && t == r.i;
    float d[STATES], s[STATES], next[STATES], kept[KEPT + 1], dx[G] = {}, du[G] = {}, ds[STATES] = {};
    SIRE_EACH (k, STATES) {
      s[k] = staged_state(now, k, row, u);
      next[k] = after(k, row, u);
      d[k] = own(k, row, u) + staged_state(now, STATES + k, row, u);
      after(k, row, u) = s[k];
    }
    SIRE_EACH (k, KEPT) kept[k] = float(staged(now, k, row, u));
    if (running) {
      if (t == r.stop)
        SIRE_EACH (k, STATES) {
          const float* from = r.original ? g.d_last[k] : g.d_variants[k];
          if (from) d[k] += from[(r.original ? r.b : r.v) * p.H + unit];
        }
      if (r.original) {
        add_ends(r, t, unit, cursor(row), next[0], d);
      } else if (t == r.stop && g.d_penalty) {
        d[0] += pull(r.v, this->span_row(r, t), g.states[0][this->original_row(r, t) * p.H + unit], unit);
      }
      Cell::template step_backward<Math>(d, s, next, kept, dx, du, ds);
      if (r.original) add_starts(r, t, unit, cursor(row), du, ds);
    }
    if (r.original && unit < p.H) {
      const int64_t at = this->original_row(r, t) * G * p.H + unit;
      SIRE_EACH (k, G) {
        static_cast<E*>(g.dx)[at + k * p.H] = E(dx[k]);
        static_cast<E*>(g.du)[at + k * p.H] = E(du[k]);
      }
    } else if (running) {
      const auto gradient = [&](int k) { return k < G ? du[k] : dx[G - 1]; };
      if (starts) {
        SIRE_EACH (k, D) first(r.v, unit)[k * p.H] = gradient(k);
        SIRE_EACH (k, STATES) first(r.v, unit)[(D + k) * p.H] = ds[k];
      } else {
        E* to = static_cast<E*>(g.d_spans) + this->span_row(r, t) * D * p.H + unit;
        SIRE_EACH (k, D) to[k * p.H] = E(gradient(k));
      }
    }
    const bool goes_on = running && !starts;
    SIRE_EACH (k, G) operand(now, k, row)[unit] = E(goes_on ? du[k] : 0);
    SIRE_EACH (k, STATES) own(k, row, u) = goes_on ? ds[k] : 0;
  }

  SIRE_DEVICE void step(int tau) {
    const int now = tau % 2;
    fetch_step(1 - now, tau - 1);
    if (!this->part) {
      // originals take what variants have left them in this step
      SIRE_ROLLED
      for (int turn = 0; turn < 2 * kTiles; ++turn) {
        this->each_of(turn % kTiles, [&](int, int, int row, int u) {
          if (shared.rows[row].original == (turn >= kTiles)) step_unit(now, tau, row, u);
        });
        warp_barrier();
      }
      if (this->lane < kRows) advance(this->lane, tau);
    }
    exchange(now);
    Sum sums[kTiles][G] = {};
    this->multiply(now, sums);
    if (!this->part)
      each([&](int n, int e, int row, int u) {
        SIRE_EACH (k, G) own(0, row, u) += sums[n][k][e];
      });
  }

  SIRE_DEVICE void advance(int row, int t) const {
    const Row& r = shared.rows[row];
    Cursor& at = cursor(row);
    for (; at.end == t && t <= r.stop; at.end = next(r, g.end_times, at.n_ended)) ++at.n_ended;
    for (; at.start == t && t <= r.stop; at.start = next(r, g.start_times, at.n_started)) ++at.n_started;
  }

  SIRE_DEVICE void run() {
    this->each_tile([&] {
      for (int pass = this->passes() - 1; pass >= 0; --pass) {
        this->set_rows(pass);
        const int steps = this->steps(pass);
        if (!steps) continue;
        begin(steps);
        for (int tau = steps - 1; tau >= 0; --tau) step(tau);
        finish();
      }
    });
  }

  SIRE_DEVICE void finish() const {
    if (!this->part)
      each([&](int, int, int row, int u) {
        const Row& r = shared.rows[row];
        if (r.original && unit0 + u < p.H)
          SIRE_EACH (k, STATES) g.d_start[k][r.b * p.H + unit0 + u] = own(k, row, u);
      });
  }
};

template <class Cell, class E>
SIRE_KERNEL(32 * kWarps)
backward_kernel(const Backward g) {
  BackwardTile<Cell, E>(g).run();
}

// ------------------------------------------------------------------ what variants owe to their inputs

constexpr int kGatherThreads = 128;

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
      const int i = int(call.swaps[2 * v]), j = int(call.swaps[2 * v + 1]);
      if (i == j || t < i || t > call.ends[v]) continue;
      const int step = (t == i ? j : t == j ? i : t) - i;  // of the span, that has read this input
      const auto owed = [&](int g) {
        const int at = (g < G - 1 ? g : D - 1) * call.H + unit;
        if (!step) return call.d_first[v * WIDTH * call.H + at];
        return float(static_cast<const E*>(call.d_spans)[(v * call.S + step) * D * call.H + at]);
      };
      SIRE_EACH (g, G) total[g] += owed(g);
    }
    SIRE_EACH (g, G) dx[g * call.H] = E(total[g]);
  }
}

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

// ------------------------------------------------------------------ launches

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

template <class Cell, class E, bool kBackward, class Call>
void launch_tiles(void (*kernel)(Call), const Call& call, uintptr_t stream) {
  const Split split(call.H, call.blocks, kFactors<E>);
  const bool mailbox = call.mailbox;
  Grid grid{int64_t(call.groups) * call.blocks, 32 * split.warps(), 0, mailbox ? 1 : call.blocks, mailbox};
  grid.shared = Shared<Cell, E, kBackward>(nullptr, split, call.blocks, mailbox).bytes;
  launch(kernel, grid, stream, call);
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
    const Grid grid{int64_t(call.T) * call.B, kGatherThreads, 0, 1, false};
    launch(gather_kernel<decltype(c), decltype(e)>, grid, stream, call);
  });
}

void barriers(const Barriers& call, uintptr_t stream) {
  const bool cooperative = call.arrived;
  const Grid grid{call.blocks, 32 * kWarps, 0, cooperative ? 1 : call.blocks, cooperative};
  launch(barriers_kernel, grid, stream, call);
}

}  // namespace sire_fast::cuda
