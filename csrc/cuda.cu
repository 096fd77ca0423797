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

// Functions as exact as the factors of a product, of type E, are.
template <class E>
struct Math {
  using V = float;
  static SIRE_DEVICE float exp(float x) {
    if constexpr (std::is_same_v<E, float>)
      return gpu::exp(x);
    else
      return exp2(1.44269504f * x);
  }
  static SIRE_DEVICE float sigmoid(float x) {
    if constexpr (std::is_same_v<E, Bfloat16>)
      return 0.5f + 0.5f * tanh(0.5f * x);
    else
      return reciprocal(1 + exp(-x));
  }
  static SIRE_DEVICE float tanh(float x) {
    if constexpr (std::is_same_v<E, Bfloat16>)
      return tanh_to_11_bits(x);
    else if constexpr (std::is_same_v<E, Float16>)
      return 1 - 2 * reciprocal(1 + exp(2 * x));
    else
      return gpu::tanh(x);
  }
  static SIRE_DEVICE float relu(float x) { return x < 0 ? 0 : x; }  // a NaN stays one
  static SIRE_DEVICE float positive(float condition, float value) { return condition <= 0 ? 0 : value; }
};

// How many factors of a product a word holds.
template <class E>
constexpr int kFactors = 4 / int(sizeof(E));

SIRE_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How the units of a layer and the sum over them are split.
struct Split {
  int tiles;          // of kUnits units, of a block
  int sum;            // tiles of the sum
  int splits;         // of the sum, between warps
  int tile_bits = 0;  // of numbers of tiles
  SIRE_HOST_DEVICE Split(int H, int blocks, int factors)
      : tiles(ceil_div(ceil_div(H, kUnits), blocks)),
        sum(ceil_div(H, kTileWords * factors)),
        splits(ceil_div(sum, kSlots)) {
    while (1 << tile_bits < tiles) ++tile_bits;
  }
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

// A row in a step of the forward: what would be the same for all units is worked out once. Pointers to rows
// of H values, null for what there is not.
template <class Cell, class E>
struct ForwardVisit {
  bool running;
  float* states[Cell::states];  // where the next states go, 0 where it is not running
  float* ended[Cell::states];   // and those of a variant at its end
  E* gates;
  const E* inputs;  // of the step after this one
};

// And of the backward.
template <class Cell, class E>
struct BackwardVisit {
  bool running, first, last;  // first: of a variant, whose gradients go to d_first
  int ended, ends;            // variants that end here: the first in end_order, and how many
  int started, starts;        // so for those that start
  int64_t at;                 // of the gradients' row in their tensor
  const E* gates;             // of the step before this one
  const float* before[Cell::states];
  const float* incoming[Cell::states];
};

// Where an original is in the lists of its variants' ends and starts.
struct Cursor {
  int ended, started;
  int end, start;  // the next ones
};

// A block's shared memory. Rows of values have 16 bytes more than they need, so that rows start in different
// banks.
template <class Cell, class E, bool kBackward>
struct Shared {
  static constexpr int kOperands = kBackward ? Cell::gates : 1;  // factors of a row: of each gate, or h
  static constexpr int kStaged = kBackward ? Cell::saved : Cell::gates;
  static constexpr int kStagedStates = kBackward ? 2 * Cell::states : 0;  // s, d_states
  using Visit = std::conditional_t<kBackward, BackwardVisit<Cell, E>, ForwardVisit<Cell, E>>;

  // of operands: a block that nobody writes to needs no second one if the warps wait for each other's parts
  // of the sum, and with that for the reading of the first
  int buffers;
  int operand_stride, staged_stride, state_stride;  // of rows
  Row* rows;                                        // (kRows)
  Cursor* cursors;                                  // (kRows)
  Visit* visits;                                    // (2, kRows)
  float* sums;           // (splits, tiles, kTiles, 2, gates, 2, 32), what warps have summed for others
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
    take(cursors, kBackward ? kRows : 0);
    take(visits, 2 * kRows);
    take(sums, split.splits > 1 ? split.warps() * Cell::gates * kTiles * 128 : 0);
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

using Sum = float[4];  // a thread's part of a product: of each of two units two rows

// Neighbours in memory, moved together.
template <class V>
struct alignas(2 * sizeof(V)) Two {
  V x[2];
};

template <class V>
SIRE_DEVICE void load(float (&to)[2], const V* from) {
  const Two<V> two = *reinterpret_cast<const Two<V>*>(from);
  SIRE_EACH (e, 2) to[e] = float(two.x[e]);
}
template <class V>
SIRE_DEVICE void store(V* to, const float (&from)[2]) {
  *reinterpret_cast<Two<V>*>(to) = {V(from[0]), V(from[1])};
}

// A thread's words of a factor of a product.
template <class E, int N>
struct Factors {
  const uint32_t (&words)[N];
  SIRE_DEVICE Factors(const uint32_t (&words)[N]) : words(words) {}
};
// A float32 is the sum of two TF32 numbers, up to its last bits.
template <int N>
struct Factors<float, N> {
  uint32_t words[N], small[N];
  SIRE_DEVICE Factors(const uint32_t (&of)[N]) {
    SIRE_EACH (n, N) {
      const float rounded = to_tf32(from_bits(of[n]));
      words[n] = bits(rounded);
      small[n] = bits(to_tf32(from_bits(of[n]) - rounded));
    }
  }
};

// A thread's view of the tile that its block works on. It takes the steps of two neighbouring units, u and
// u + 1 of the block, for two rows of each tile of rows.
template <class Cell, class E, bool kBackward>
struct Tile {
  static constexpr int G = Cell::gates, STATES = Cell::states;
  const Pass& p;
  const Split split;
  const Shared<Cell, E, kBackward> shared;
  const int group, rank;
  const int unit0;                   // of the block
  const int warp, lane, tile, part;  // tile of units and part of the sum of this warp
  const int u, unit;
  int taken = 0;             // bits of the rows whose steps it takes
  uint32_t w[G][kSlots][4];  // W_hh, transposed in the backward
  int first_sequence;        // of the rows
  uint32_t exchanges = 0;    // through the mailbox

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
        part(warp / split.tiles),
        u(tile * kUnits + lane / 4 * 2),
        unit(unit0 + u) {
    const int sharing = split.splits < 2 * kTiles ? split.splits : 2 * kTiles;
    SIRE_EACH (n, 2 * kTiles)
      if (part == n * sharing / (2 * kTiles)) taken |= 1 << n;
    SIRE_EACH (g, G)
      SIRE_EACH (slot, kSlots)
        SIRE_EACH (r, 4) w[g][slot][r] = weight(g, slot, r);
    meet();  // nobody writes to a block that has not begun
  }

  SIRE_DEVICE uint32_t weight(int g, int slot, int r) const {
    const int first = ((part * kSlots + slot) * kTileWords + lane % 4 + r / 2 * 4) * kFactors<E>;
    const auto* w_hh = static_cast<const E*>(p.w_hh) + int64_t(g) * p.H * p.H;
    uint32_t word = 0;
    SIRE_EACH (n, kFactors<E>) {
      const int k = first + n, of = unit + r % 2;
      const int64_t at = kBackward ? int64_t(k) * p.H + of : int64_t(of) * p.H + k;
      if (of < p.H && k < p.H) word |= bits(w_hh[at]) << 16 * n;
    }
    return word;
  }

  // Calls body() for each tile of sequences of the group.
  template <class F>
  SIRE_DEVICE void each_tile(F body) {
    for (first_sequence = group * p.N; first_sequence < p.B; first_sequence += p.groups * p.N) body();
  }

  // A thread has sums for these rows, of its units those at [n][..][c] and [n][..][c + 2]. Warps that share
  // them take the steps of some of the rows each.
  SIRE_DEVICE int row_of(int n, int c) const { return n * kTile + lane % 4 * 2 + c; }
  SIRE_DEVICE bool takes(int n, int c) const { return taken >> (2 * n + c) & 1; }

  // Calls body(n, c, row) for the rows that this thread takes.
  template <class F>
  SIRE_DEVICE void each_row(F body) const {
    SIRE_EACH (n, kTiles)
      SIRE_EACH (c, 2)
        if (takes(n, c)) body(n, c, row_of(n, c));
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

  SIRE_DEVICE auto& visit(int buffer, int row) const { return shared.visits[buffer * kRows + row]; }
  // of this thread's units
  SIRE_DEVICE float* own(int k, int row) const {
    return shared.own + (k * kRows + row) * shared.state_stride + u;
  }
  SIRE_DEVICE float* after(int k, int row) const {
    return shared.after + (k * kRows + row) * shared.state_stride + u;
  }
  // of all units of the block
  SIRE_DEVICE E* staged(int buffer, int field, int row) const {
    return shared.staged + ((buffer * shared.kStaged + field) * kRows + row) * shared.staged_stride;
  }
  SIRE_DEVICE float* staged_state(int buffer, int field, int row) const {
    return shared.staged_states +
           ((buffer * shared.kStagedStates + field) * kRows + row) * shared.state_stride;
  }
  // factors of a row of a product, for the units of all blocks
  SIRE_DEVICE E* operand(int buffer, int field, int row) const {
    const int at = shared.buffers > 1 ? buffer : 0;
    return shared.operand + ((at * shared.kOperands + field) * kRows + row) * shared.operand_stride;
  }

  // Calls body(row, u) for the pieces of 16 bytes of so many rows of this block's units: those from u on.
  template <class V, class F>
  SIRE_DEVICE void each_piece(int rows, F body) const {
    constexpr int kPiece = 16 / int(sizeof(V));
    const int shift = split.tile_bits + (kPiece == 4 ? 2 : 1), at = (thread() & ((1 << shift) - 1)) * kPiece;
    if (at < split.units())
      for (int row = thread() >> shift; row < rows; row += threads() >> shift) body(row, at);
  }

  // Starts to copy, for each row, this block's units of kFields rows of H values, the first of which is
  // source(row). Where that is null, what was there stays; units beyond H are 0.
  template <int kFields, class V, class Source>
  SIRE_DEVICE void fetch(V* to, int stride, Source source) const {
    constexpr int kPiece = 16 / int(sizeof(V));
    each_piece<V>(kRows, [&](int row, int at) {
      const V* from = source(row);
      if (!from) return;
      from += unit0 + at;
      V* piece = to + row * stride + at;
      const int field_size = kRows * stride, there = p.H - unit0 - at;  // there: values from here on
      const auto address = reinterpret_cast<uintptr_t>(from) | p.H * sizeof(V);
      if (address % 16 == 0 && there >= kPiece) {
        SIRE_EACH (field, kFields) copy_async<16>(piece + field * field_size, from + field * p.H);
      } else {
        SIRE_ROLLED
        for (int field = 0; field < kFields; ++field, piece += field_size, from += p.H)
          address % 4 == 0 ? fetch_words<4>(piece, from, there)
                           : fetch_words<int(sizeof(V))>(piece, from, there);
      }
    });
  }

  // A piece of so many values, and zeros behind them.
  template <int kBytes, class V>
  SIRE_DEVICE static void fetch_words(V* to, const V* from, int there) {
    constexpr int kWord = kBytes / int(sizeof(V));
    for (int n = 0; n < 16 / int(sizeof(V)); n += kWord)
      if (n >= there)
        for (int k = n; k < n + kWord; ++k) to[k] = V(0.0f);
      else if constexpr (kBytes >= 4)
        copy_async<kBytes>(to + n, from + n);
      else
        to[n] = from[n];
  }

  // ---------------------------------------------------------------- product

  // Adds the product of W_hh, or its transpose, with the operands to sums; the whole sum is there for the
  // rows that this thread takes.
  SIRE_DEVICE void multiply(int buffer, Sum (&sums)[kTiles][G]) const {
    const auto* words =
        reinterpret_cast<const uint32_t*>(operand(buffer, 0, lane / 16 * kTile + lane % kTile)) +
        part * kSlots * kTileWords + lane / 8 % 2 * 4;
    const int field_words = kRows * shared.operand_stride / kFactors<E>;
    SIRE_EACH (slot, kSlots) {
      if (part * kSlots + slot >= split.sum) break;
      SIRE_EACH (field, shared.kOperands) {
        uint32_t b[kTiles][2];
        load_fragments(b, words + field * field_words + slot * kTileWords);
        const Factors<E, 2> of_b[kTiles] = {b[0], b[1]};
        SIRE_EACH (of_field, G / shared.kOperands) {  // one gate's, or all gates of h
          const int gate = field + of_field;
          const Factors<E, 4> of_a(w[gate][slot]);
          SIRE_EACH (n, kTiles) add(sums[n][gate], of_a, of_b[n]);
        }
      }
    }
    if (split.splits == 1) return;
    const auto shared_sum = [&](int of, int n, int c, int g, int e) -> float& {
      const int block = ((of * split.tiles + tile) * kTiles + n) * 2 + c;
      return shared.sums[((block * G + g) * 2 + e) * 32 + lane];
    };
    SIRE_EACH (n, kTiles)
      SIRE_EACH (c, 2)
        if (!takes(n, c))
          SIRE_EACH (g, G)
            SIRE_EACH (e, 2) shared_sum(part, n, c, g, e) = sums[n][g][c + 2 * e];
    barrier();
    each_row([&](int n, int c, int) {
      float total[G][2] = {};
      SIRE_ROLLED
      for (int of = 0; of < split.splits; ++of)  // in this order for all rows
        SIRE_EACH (g, G)
          SIRE_EACH (e, 2) total[g][e] += of == part ? sums[n][g][c + 2 * e] : shared_sum(of, n, c, g, e);
      SIRE_EACH (g, G)
        SIRE_EACH (e, 2) sums[n][g][c + 2 * e] = total[g][e];
    });
  }

  // Adds one tile's product. That of the small parts of float32 is left out; the matrix unit cuts its sums
  // off, so that these begin at 0 in each tile and are added with rounding.
  SIRE_DEVICE void add(Sum& sum, const Factors<E, 4>& a, const Factors<E, 2>& b) const {
    if constexpr (sizeof(E) == 4) {
      Sum of_tile = {};
      if (!p.tf32) {
        mma(of_tile, a.small, b.words, E());
        mma(of_tile, a.words, b.small, E());
      }
      mma(of_tile, a.words, b.words, E());
      SIRE_EACH (e, 4) sum[e] += of_tile[e];
    } else {
      mma(sum, a.words, b.words, E());
    }
  }

  // What was fetched has come, and nobody of the cluster is behind.
  SIRE_DEVICE void meet() const {
    wait_for_copies();
    p.blocks > 1 && !p.mailbox ? cluster_barrier() : barrier();
  }

  // Ends a step: as `meet`, and the operands of all blocks have come to this one.
  SIRE_DEVICE void exchange(int buffer) {
    if (p.blocks > 1) {
      barrier();
      p.mailbox ? exchange_in_mailbox(buffer) : exchange_in_cluster(buffer);
    }
    meet();
  }

  // Calls body(peer) for all other blocks of the group, the next one first.
  template <class F>
  SIRE_DEVICE void each_peer(F body) const {
    for (int peer = rank + 1; peer != rank + p.blocks; ++peer) body(peer < p.blocks ? peer : peer - p.blocks);
  }

  SIRE_DEVICE uint4* operand_piece(int buffer, int of_rank, int row, int at) const {
    return reinterpret_cast<uint4*>(operand(buffer, 0, row) + of_rank * split.units() + at);
  }

  SIRE_DEVICE void exchange_in_cluster(int buffer) const {
    each_piece<E>(shared.kOperands * kRows, [&](int row, int at) {
      uint4* piece = operand_piece(buffer, rank, row, at);
      const uint4 value = *piece;
      each_peer([&](int peer) { store_to_peer(piece, peer, value); });
    });
  }

  SIRE_DEVICE void exchange_in_mailbox(int buffer) {
    const int rows = shared.kOperands * kRows, width = p.blocks * split.units();
    E* mailbox = static_cast<E*>(p.mailbox) + (group * 2 + exchanges % 2) * rows * width;
    const auto mailed = [&](int of_rank, int row, int at) {
      return reinterpret_cast<uint4*>(mailbox + row * width + of_rank * split.units() + at);
    };
    each_piece<E>(rows,
                  [&](int row, int at) { *mailed(rank, row, at) = *operand_piece(buffer, rank, row, at); });
    group_barrier(p.arrived + group * p.blocks, rank, p.blocks, ++exchanges);
    each_piece<E>(rows, [&](int row, int at) {
      each_peer(
          [&](int peer) { copy_async<16>(operand_piece(buffer, peer, row, at), mailed(peer, row, at)); });
    });
  }
};

// ------------------------------------------------------------------ forward

template <class Cell, class E>
struct ForwardTile : Tile<Cell, E, false> {
  using Base = Tile<Cell, E, false>;
  using Base::each_row, Base::exchange, Base::live, Base::operand, Base::original_row, Base::own, Base::p,
      Base::put, Base::shared, Base::span_row, Base::staged, Base::u, Base::unit, Base::visit;
  static constexpr int G = Cell::gates, STATES = Cell::states, KEPT = Cell::saved;
  const Forward& f;

  SIRE_DEVICE explicit ForwardTile(const Forward& f) : Base(f), f(f) {}

  SIRE_DEVICE const E* inputs(const Row& r, int t) const {
    const int source = t == r.i ? r.j : t == r.j ? r.i : t;
    if (!live(r) || t > r.stop) return nullptr;
    return static_cast<const E*>(p.x) + original_row(r, source) * G * p.H;
  }

  SIRE_DEVICE void prepare(int buffer, int tau) const {
    if (thread() >= kRows) return;
    const Row& r = shared.rows[thread()];
    const int t = r.origin + tau;
    const bool running = live(r) && t <= r.stop, in_span = running && t >= r.i;
    auto& to = visit(buffer, thread()) = {running, {}, {}, nullptr, inputs(r, t + 1)};
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
    prepare(0, 0);
    each_row([&](int, int, int row) {
      const Row& r = shared.rows[row];
      SIRE_EACH (k, STATES) {
        float s[2] = {};
        if (live(r)) this->get(s, this->before(f.states, nullptr, r, r.origin, k));
        store(own(k, row), s);
        if (k == 0) store(operand(0, 0, row) + unit, s);
      }
    });
    exchange(0);
  }

  SIRE_DEVICE void step(int tau, const float (&bias)[2][G]) {
    const int now = tau % 2;
    fetch_inputs(1 - now, [&](int row) { return visit(now, row).inputs; });
    prepare(1 - now, tau + 1);
    Sum sums[kTiles][G];
    SIRE_EACH (n, kTiles)
      SIRE_EACH (g, G)
        SIRE_EACH (e, 4) sums[n][g][e] = bias[e / 2][g];
    this->multiply(now, sums);
    each_row([&](int n, int c, int row) {
      const auto at = visit(now, row);
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
    exchange(1 - now);
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
    if (this->rank) return;  // the barrier of the last step is behind all blocks' states
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
  using Base::after, Base::each_row, Base::exchange, Base::get, Base::live, Base::operand, Base::original_row,
      Base::own, Base::p, Base::put, Base::shared, Base::span_row, Base::staged, Base::staged_state, Base::u,
      Base::unit, Base::visit;
  static constexpr int G = Cell::gates, STATES = Cell::states, KEPT = Cell::saved, D = Cell::gradients;
  const Backward& g;

  SIRE_DEVICE explicit BackwardTile(const Backward& g) : Base(g), g(g) {}

  SIRE_DEVICE int next(const Row& r, const int64_t* times, int n) const {
    return r.original && n < p.K ? int(times[r.b * p.K + n]) : -1;
  }

  // Once for each step, the last one first.
  SIRE_DEVICE void prepare(int buffer, int tau) const {
    if (thread() >= kRows) return;
    const Row& r = shared.rows[thread()];
    Cursor& cursor = shared.cursors[thread()];
    const int t = r.origin + tau, earlier = t - 1;
    auto& to = visit(buffer, thread()) = {};
    to.running = live(r) && t <= r.stop && (r.original || t >= r.i);
    to.first = t == r.i;
    to.last = t == r.stop;
    to.at = original_row(r, t) * G * p.H;
    if (!r.original) to.at = to.first ? r.v * (D + STATES) * p.H : span_row(r, t) * D * p.H;
    to.ended = cursor.ended;
    to.started = cursor.started;
    for (; cursor.end == t; cursor.end = next(r, g.end_times, cursor.ended)) ++cursor.ended;
    for (; cursor.start == t; cursor.start = next(r, g.start_times, cursor.started)) ++cursor.started;
    to.ends = cursor.ended - to.ended;
    to.starts = cursor.started - to.started;
    if (!live(r) || tau == 0 || (r.variant && earlier < r.i) || earlier > r.stop + 1) return;
    const bool running = earlier <= r.stop;
    if (running) to.gates = static_cast<const E*>(g.gates) + this->gates_row(r, earlier) * KEPT * p.H;
    SIRE_EACH (k, STATES) {
      to.before[k] = this->before(g.states, g.spans, r, earlier, k);
      if (running && r.original && g.d_states[k])
        to.incoming[k] = g.d_states[k] + original_row(r, earlier) * p.H;
    }
  }

  // Gates of the step before that of a visit, the states before it, and the gradients that come from outside.
  SIRE_DEVICE void fetch_step(int buffer, int visits) const {
    this->template fetch<KEPT>(staged(buffer, 0, 0), shared.staged_stride,
                               [&](int row) { return visit(visits, row).gates; });
    SIRE_EACH (k, STATES) {
      this->template fetch<1>(staged_state(buffer, k, 0), shared.state_stride,
                              [&](int row) { return visit(visits, row).before[k]; });
      this->template fetch<1>(staged_state(buffer, STATES + k, 0), shared.state_stride,
                              [&](int row) { return visit(visits, row).incoming[k]; });
    }
  }

  SIRE_DEVICE void begin(int steps) {
    if (thread() < kRows) {
      const Row& r = shared.rows[thread()];
      shared.cursors[thread()] = {0, 0, next(r, g.end_times, 0), next(r, g.start_times, 0)};
    }
    prepare(steps % 2, steps);
    prepare((steps - 1) % 2, steps - 1);
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
    barrier();
    fetch_step((steps - 1) % 2, steps % 2);
    this->meet();
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
      const int64_t i = g.swaps[2 * v];
      if (i < g.swaps[2 * v + 1]) {
        if (g.d_penalty) add_pull(d[0], -1, v, v * p.S + t - i, h);
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
  SIRE_DEVICE void step_row(int now, int tau, int row) const {
    const Row& r = shared.rows[row];
    const auto at = visit(now, row);
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

  SIRE_DEVICE void step(int tau) {
    const int now = tau % 2;
    fetch_step(1 - now, now);
    if (tau) prepare(1 - now, tau - 1);
    // originals take what variants have left them in this step
    SIRE_ROLLED
    for (int turn = 0; turn < 2; ++turn) {
      SIRE_ROLLED
      for (int n = 0; n < 2 * kTiles; ++n) {
        const int row = this->row_of(n / 2, n % 2);
        if (this->takes(n / 2, n % 2) && shared.rows[row].original == bool(turn)) step_row(now, tau, row);
      }
      this->split.splits == 1 ? warp_barrier() : barrier();
    }
    exchange(now);
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
        const int steps = this->steps(pass);
        if (!steps) continue;
        begin(steps);
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
