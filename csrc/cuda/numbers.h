// Numbers of a dtype: the functions that a cell's step takes of them, and pairs of them in memory.
#pragma once

#include <type_traits>

#include "gpu.h"

namespace sire_fast::cuda {

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
  static SIRE_DEVICE float tanh_again(float c, float, float) { return tanh(c); }  // h is rounded to a dtype
  static SIRE_DEVICE float relu(float x) { return x < 0 ? 0 : x; }                // a NaN stays one
  static SIRE_DEVICE float positive(float condition, float value) { return condition <= 0 ? 0 : value; }
};

// Neighbours in memory, moved together.
template <class V>
struct alignas(2 * sizeof(V)) Two {
  V x[2];
};

template <class V>
SIRE_DEVICE void load(float (&to)[2], const V* from) {
  const Two<V> two = *aligned<const Two<V>>(from);
  SIRE_EACH (e, 2) to[e] = float(two.x[e]);
}
template <class V>
SIRE_DEVICE void store(V* to, const float (&from)[2]) {
  if constexpr (sizeof(V) == 2)
    *aligned<uint32_t>(to) = bits_of_two(from, V());
  else
    *aligned<Two<V>>(to) = {from[0], from[1]};
}

}  // namespace sire_fast::cuda
