// The recurrent cells, one step and its gradient: values in, values out, for the host and for CUDA.
// Equation numbers are those of sire_fast/cells.py. Nothing here loads or stores.
//
//   x     input halves W_ih x + b_ih of the gates, in torch.nn's order
//   u     recurrent halves W_hh h + b_hh, in the same order
//   s     states before the step: h, or h and c
//   next  states after it
//   kept  what the gradient needs beside the states
//   d*    gradient of the loss with respect to *; ds leaves out the path through u, which is a product with
//   W_hh
//
// saved counts the blocks of H in kept, gradients the different ones of dx and du: du's, and dx's last if it
// is not du's. M supplies V (a number or a vector of them) and sigmoid, tanh, tanh_again(c, h, o) where
// h = o tanh(c), relu, positive(condition, value).
#pragma once

#ifdef __CUDACC__
#define SIRE_FN __host__ __device__ __forceinline__
#else
#define SIRE_FN inline __attribute__((always_inline))
#endif

namespace sire_fast {

struct RnnTanh {
  static constexpr int gates = 1, states = 1, saved = 0, gradients = 1;

  template <class M, class V = typename M::V>
  static SIRE_FN void step(const V* x, const V* u, const V*, V* next, V*) {
    next[0] = M::tanh(x[0] + u[0]);  // (1)
  }

  template <class M, class V = typename M::V>
  static SIRE_FN void step_backward(const V* dnext, const V*, const V* next, const V*, V* dx, V* du, V* ds) {
    dx[0] = du[0] = dnext[0] * (1 - next[0] * next[0]);
    ds[0] = V{};
  }
};

struct RnnRelu {
  static constexpr int gates = 1, states = 1, saved = 0, gradients = 1;

  template <class M, class V = typename M::V>
  static SIRE_FN void step(const V* x, const V* u, const V*, V* next, V*) {
    next[0] = M::relu(x[0] + u[0]);  // (2)
  }

  template <class M, class V = typename M::V>
  static SIRE_FN void step_backward(const V* dnext, const V*, const V* next, const V*, V* dx, V* du, V* ds) {
    dx[0] = du[0] = M::positive(next[0], dnext[0]);
    ds[0] = V{};
  }
};

struct Gru {
  static constexpr int gates = 3, states = 1, saved = 4, gradients = 4;

  template <class M, class V = typename M::V>
  static SIRE_FN void step(const V* x, const V* u, const V* s, V* next, V* kept) {
    const V r = M::sigmoid(x[0] + u[0]);   // (3)
    const V z = M::sigmoid(x[1] + u[1]);   // (4)
    const V n = M::tanh(x[2] + r * u[2]);  // (5)
    next[0] = n + z * (s[0] - n);          // (6)
    kept[0] = r;
    kept[1] = z;
    kept[2] = n;
    kept[3] = u[2];
  }

  template <class M, class V = typename M::V>
  static SIRE_FN void step_backward(const V* dnext, const V* s, const V*, const V* kept, V* dx, V* du,
                                    V* ds) {
    const V r = kept[0], z = kept[1], n = kept[2];
    dx[2] = dnext[0] * (1 - z) * (1 - n * n);
    dx[1] = du[1] = dnext[0] * (s[0] - n) * z * (1 - z);
    dx[0] = du[0] = dx[2] * kept[3] * r * (1 - r);
    du[2] = dx[2] * r;
    ds[0] = dnext[0] * z;
  }
};

struct Lstm {
  static constexpr int gates = 4, states = 2, saved = 4, gradients = 4;

  template <class M, class V = typename M::V>
  static SIRE_FN void step(const V* x, const V* u, const V* s, V* next, V* kept) {
    const V i = M::sigmoid(x[0] + u[0]), f = M::sigmoid(x[1] + u[1]);
    const V o = M::sigmoid(x[3] + u[3]);  // (7)
    const V g = M::tanh(x[2] + u[2]);     // (8)
    next[1] = f * s[1] + i * g;           // (9)
    next[0] = o * M::tanh(next[1]);       // (10)
    kept[0] = i;
    kept[1] = f;
    kept[2] = g;
    kept[3] = o;
  }

  template <class M, class V = typename M::V>
  static SIRE_FN void step_backward(const V* dnext, const V* s, const V* next, const V* kept, V* dx, V* du,
                                    V* ds) {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3];
    const V tanh_c = M::tanh_again(next[1], next[0], o);
    const V dc = dnext[1] + dnext[0] * o * (1 - tanh_c * tanh_c);
    dx[0] = du[0] = dc * g * i * (1 - i);
    dx[1] = du[1] = dc * s[1] * f * (1 - f);
    dx[2] = du[2] = dc * i * (1 - g * g);
    dx[3] = du[3] = dnext[0] * tanh_c * o * (1 - o);
    ds[0] = V{};
    ds[1] = dc * f;
  }
};

}  // namespace sire_fast
