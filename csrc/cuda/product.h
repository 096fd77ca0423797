// The product of a step: W_hh, which stays in registers, with the operands in shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "api.h"
#include "gpu.h"
#include "layout.h"
#include "place.h"

namespace sire_fast::cuda {

struct Tf32 {};  // factors of float32 that are rounded: weights when they are loaded, operands in the product
using Sum = float[4];  // a thread's part of a product: of each of two units two rows

// A thread's words of a factor of a product: 4 of weights, or 2 of an operand.
template <class E, int N>
struct Factors {
  const uint32_t (&words)[N];
  SIRE_DEVICE Factors(const uint32_t (&words)[N]) : words(words) {}
};
template <>
struct Factors<Tf32, 2> {
  uint32_t words[2];
  SIRE_DEVICE Factors(const uint32_t (&of)[2]) {
    SIRE_EACH (n, 2) words[n] = bits(to_tf32(from_bits(of[n])));
  }
};
// A float32 is the sum of two TF32 numbers, up to its last bit: the matrix unit reads no more of the second.
template <int N>
struct Factors<float, N> {
  uint32_t words[N], small[N];
  SIRE_DEVICE Factors(const uint32_t (&of)[N]) {
    SIRE_EACH (n, N) {
      words[n] = bits_to_tf32(of[n]);
      small[n] = bits(from_bits(of[n]) - from_bits(words[n]));
    }
  }
};

// A thread with its part of W_hh, or of its transpose in the backward.
template <class Cell, class E, bool kBackward>
struct Product : Place<Cell, E, kBackward> {
  using Base = Place<Cell, E, kBackward>;
  using Base::each_row, Base::lane, Base::operand, Base::p, Base::part, Base::rows, Base::shared, Base::split,
      Base::takes, Base::tile, Base::unit;
  static constexpr int G = Cell::gates;
  uint32_t w[G][kSlots][4];

  SIRE_DEVICE explicit Product(const Pass& p) : Base(p) {
    SIRE_EACH (g, G)
      SIRE_EACH (slot, kSlots)
        SIRE_EACH (half, 2) {
          const int k = ((part * kSlots + slot) * kTileWords + lane % 4 + half * 4) * kFactors<E>;
          SIRE_EACH (e, 2) {  // of units `unit` and `unit + 1`
            uint32_t& word = w[g][slot][2 * half + e];
            if (!kBackward)
              word = weights(g, unit + e, k);
            else if (kFactors<E> == 1)
              word = weights(g, k, unit + e);
            else
              word = (weights(g, k, unit) >> 16 * e & 0xffff) | weights(g, k + 1, unit) >> 16 * e << 16;
            if constexpr (sizeof(E) == 4)
              if (p.tf32) word = bits(to_tf32(from_bits(word)));
          }
        }
  }

  // A word of a gate's row of W_hh from a column on, 0 where it ends.
  SIRE_DEVICE uint32_t weights(int g, int row, int column) const {
    if (row >= p.H || column >= p.H) return 0;
    const auto* at = static_cast<const E*>(p.w_hh) + (int64_t(g) * p.H + row) * p.H + column;
    if ((reinterpret_cast<uintptr_t>(p.w_hh) | p.H * sizeof(E)) % 4 == 0) return *aligned<const uint32_t>(at);
    return bits(at[0]) | (column + 1 < p.H ? bits(at[1]) << 16 : 0);
  }

  // Adds the product of W_hh, or its transpose, with the operands to sums; the whole sum is there for the
  // rows that this thread takes.
  SIRE_DEVICE void multiply(int buffer, Sum (&sums)[kTiles][G]) const {
    if constexpr (std::is_same_v<E, float>) {
      if (p.tf32)
        multiply_part<Tf32>(buffer, sums);
      else
        multiply_part<E>(buffer, sums);
    } else {
      multiply_part<E>(buffer, sums);
    }
    if (split.splits > 1) add_parts(sums);
  }

  // This warp's part of the sum, with factors of type F, of the tiles of rows that are in use.
  template <class F>
  SIRE_DEVICE void multiply_part(int buffer, Sum (&sums)[kTiles][G]) const {
    if (rows > kTile)
      multiply_tiles<F, kTiles>(buffer, sums);
    else
      multiply_tiles<F, 1>(buffer, sums);
  }

  template <class F, int kUsed>
  SIRE_DEVICE void multiply_tiles(int buffer, Sum (&sums)[kTiles][G]) const {
    constexpr int kOperands = Base::kOperands;
    const auto* words =
        reinterpret_cast<const uint32_t*>(operand(buffer, 0, lane / 16 * kTile + lane % kTile)) +
        part * kSlots * kTileWords + lane / 8 % 2 * 4;
    const int field_words = kRows * shared.operand_stride / kFactors<E>;
    SIRE_EACH (first, kSlots / kAtOnce) {
      if (part * kSlots + first * kAtOnce >= split.sum) break;
      uint32_t b[2][kOperands][kTiles][2];  // of a slot, and of the next one
      const auto load_slot = [&](int n) {
        SIRE_EACH (field, kOperands)
          load_fragments<kUsed>(b[n % 2][field],
                                words + field * field_words + (first * kAtOnce + n) * kTileWords);
      };
      load_slot(0);
      SIRE_EACH (n, kAtOnce) {
        if (n + 1 < kAtOnce) load_slot(n + 1);
        SIRE_EACH (field, kOperands) {
          const Factors<F, 2> of_b[kTiles] = {b[n % 2][field][0], b[n % 2][field][kUsed - 1]};
          SIRE_EACH (of_field, G / kOperands) {  // one gate's, or all gates of h
            const int gate = field + of_field;
            const Factors<F, 4> of_a(w[gate][first * kAtOnce + n]);
            SIRE_EACH (tile, kUsed) add(sums[tile][gate], of_a, of_b[tile]);
          }
        }
      }
    }
  }

  // Adds the parts of the sum, for the rows that this thread takes.
  SIRE_DEVICE void add_parts(Sum (&sums)[kTiles][G]) const {
    const auto shared_sums = [&](int of, int n, int c, int g) {
      const int block = ((of * split.tiles + tile) * kTiles + n) * 2 + c;
      return shared.sums + ((block * G + g) * 32 + lane) * 2;
    };
    SIRE_EACH (n, kTiles)
      SIRE_EACH (c, 2)
        if (!takes(n, c) && n * kTile < rows)
          SIRE_EACH (g, G) store(shared_sums(part, n, c, g), {sums[n][g][c], sums[n][g][c + 2]});
    barrier();
    each_row([&](int n, int c, int) {
      float total[G][2] = {};
      SIRE_ROLLED
      for (int of = 0; of < split.splits; ++of)  // in this order for all rows
        SIRE_EACH (g, G) {
          float added[2] = {sums[n][g][c], sums[n][g][c + 2]};
          if (of != part) load(added, shared_sums(of, n, c, g));
          SIRE_EACH (e, 2) total[g][e] += added[e];
        }
      SIRE_EACH (g, G)
        SIRE_EACH (e, 2) sums[n][g][c + 2 * e] = total[g][e];
    });
  }

  // Adds one tile's product. That of the small parts of float32 is left out; the matrix unit cuts its sums
  // off, so that these begin at 0 in each tile and are added with rounding.
  template <class F>
  SIRE_DEVICE static void add(Sum& sum, const Factors<F, 4>& a, const Factors<F, 2>& b) {
    if constexpr (sizeof(E) == 4) {
      Sum of_tile = {};
      if constexpr (std::is_same_v<F, float>) {
        mma(of_tile, a.small, b.words, E());
        mma(of_tile, a.words, b.small, E());
      }
      mma(of_tile, a.words, b.words, E());
      SIRE_EACH (e, 4) sum[e] += of_tile[e];
    } else {
      mma(sum, a.words, b.words, E());
    }
  }
};

}  // namespace sire_fast::cuda
