// How units and the sum over them are split between blocks and warps, and where things lie in a block's
// shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "api.h"
#include "gpu.h"

namespace sire_fast::cuda {

constexpr int kTile = 8;  // rows of a product on the matrix unit
constexpr int kTiles = kRows / kTile;
constexpr int kUnits = 16;     // units of a warp
constexpr int kTileWords = 8;  // 32-bit words of a tile of the sum
constexpr int kSlots = 8;      // tiles of the sum of which a warp holds weights
constexpr int kAtOnce = 4;     // of them are multiplied without asking whether the sum has as many
constexpr int kWarps = 8;      // of a block, at most
constexpr int kAhead = 16;     // steps whose visits are worked out together

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

// Positions of a variant, and its last step. Nobody has checked what a GPU is given: all are brought into the
// sequence, in this order, and into the S rows that are kept, so that no address lies outside the tensors.
struct Positions {
  int i, j, stop;
  template <class Call>
  SIRE_DEVICE Positions(const Call& call, int64_t v)
      : i(within(call.swaps[2 * v], 0, call.T - 1)),
        j(within(call.swaps[2 * v + 1], i, last(call))),
        stop(within(call.ends[v], j, last(call))) {}

  SIRE_DEVICE static int within(int64_t x, int least, int most) {
    return x < least ? least : x > most ? most : int(x);
  }

 private:
  template <class Call>
  SIRE_DEVICE int last(const Call& call) const {
    return call.T - i < call.S ? call.T - 1 : i + call.S - 1;
  }
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
  Visit* visits;                                    // (kAhead, kRows)
  Arrivals* arrivals;                               // (2), in a cluster: of each buffer of operands
  float* sums;   // (splits, tiles, kTiles, 2, gates, 32, 2), what warps have summed for others
  float* own;    // (states, kRows, units), states, or their gradients
  float* after;  // backward: (states, kRows, units), states after the step
  E* operand;    // (buffers, kOperands, kRows, all units), factors of the product, 0 behind those units
  E* staged;     // (2, kStaged, kRows, units), inputs or gates of a step
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
    const int sum = ceil_div(split.sum, kAtOnce) * kAtOnce * kTileWords * kFactors<E>;
    operand_stride = (blocks * split.units() > sum ? blocks * split.units() : sum) + padding;
    staged_stride = split.units() + padding;
    state_stride = split.units() + 4;
    take(rows, kRows);
    take(visits, kAhead * kRows);
    take(arrivals, 2);
    take(sums, split.splits > 1 ? split.warps() * Cell::gates * kTiles * 128 : 0);
    take(own, Cell::states * kRows * state_stride);
    take(after, kBackward ? Cell::states * kRows * state_stride : 0);
    take(operand, buffers * kOperands * kRows * operand_stride);
    take(staged, 2 * kStaged * kRows * staged_stride);
    take(staged_states, 2 * kStagedStates * kRows * state_stride);
    bytes = at - memory;
  }

  // of 16 bytes
  SIRE_DEVICE int operand_pieces() const {
    return buffers * kOperands * kRows * operand_stride * int(sizeof(E)) / 16;
  }
};

}  // namespace sire_fast::cuda
