// The recurrent pass with its swapped variants, and its gradient: what goes in and what comes out.
//
// T steps, B sequences, K variants of each, H units; G gates, S states (h, or h and c) and N kept values by
// cell. Variant v = b * K + k of sequence b exchanges positions i and j, 0 <= i <= j <= end < length, and is
// followed to step `end`. It shares the original's states up to i - 1, so it is only run over its span
// i..end; a variant with i == j is the original and is not run at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sire_fast {

struct Sizes {
  int64_t T, B, K, H;
  int64_t I;  // of the inputs; 0 if they are projected already
};

struct Swaps {
  const int64_t* swaps;    // (B, K, 2) pairs i, j
  const int64_t* ends;     // (B, K)
  const int64_t* lengths;  // (B)
};

// What forward and backward are given alike.
template <class T>
struct Inputs {
  Sizes size;
  bool recompute;     // gates are not kept but computed again in the backward
  const T* x;         // (T, B, I), or projected, W_ih x + b_ih: (T, B, G*H)
  const T* w_ih;      // (G*H, I) or null
  const T* b_ih;      // (G*H) or null
  const T* w_hh;      // (G*H, H)
  const T* b_hh;      // (G*H) or null
  const T* start[2];  // h0, c0: (B, H); c0 is null where S = 1
  Swaps swaps;
};

template <class T>
struct Forward : Inputs<T> {
  bool train;      // keep what the backward needs
  T* states[2];    // output and cells: (T, B, H), 0 beyond a sequence's length
  T* last[2];      // h_n, c_n: (B, H)
  T* variants[2];  // variants, variant_cells: (B, K, H)
  T* penalty;      // (B, K)
  T* gates;        // (T, B, N*H), 0 beyond a sequence's length, if train and not recompute
  T* spans;  // a row of S*H states and, unless recompute, N*H gates for each step of each span, if train
};

template <class T>
struct Backward : Inputs<T> {
  const T* d_states[2];    // (T, B, H); each of these gradients may be null for zero
  const T* d_last[2];      // (B, H)
  const T* d_variants[2];  // (B, K, H)
  const T* d_penalty;      // (B, K)
  const T* states[2];      // what the forward kept
  const T* gates;
  const T* spans;
  T* dx;          // as x; each of the results may be null if it is not wanted
  T* dw_ih;       // (G*H, I)
  T* db_ih;       // (G*H)
  T* dw_hh;       // (G*H, H)
  T* db_hh;       // (G*H)
  T* d_start[2];  // (B, H)
};

// The variants in the order in which a thread meets them, made once for a call.
struct Schedule {
  const int64_t* by_start;     // variants with i < j, sorted by i, then by number
  const int64_t* start_begin;  // (T + 1): those with i = t are by_start[start_begin[t] .. start_begin[t + 1]]
  const int64_t* by_end;       // all variants, sorted by end, then by number
  const int64_t* end_begin;    // (T + 1)
  const int64_t* first_row;    // (B * K): row in `spans` of the first step of a variant
};

// A thread's share of the work: whole sequences, all of their steps.
struct Share {
  int64_t begin, end;  // sequences
  int64_t steps;       // longest of them
  int64_t rows;        // most rows, originals and running variants, that any step has a product for
  int64_t reach;       // most steps between the positions of a variant
  Schedule schedule;   // of this share's variants alone
};

// How much of what a share needs to work in, for its caller to allocate.
struct Workspace {
  int64_t values, pointers, numbers;
};

template <class T>
struct Scratch {
  T* values;
  T** pointers;
  int64_t* numbers;
};

// How a Call, Forward<T> or Backward<T>, is run: its weights are packed, by any number of threads, and then
// its shares run, independently of each other.
template <class T, class Call>
struct Kernel {
  int64_t (*packed)(const Call&);  // values that the packed weights take
  void (*pack)(const Call&, int part, int parts, T* packed);
  Workspace (*workspace)(const Call&, const Share&);
  void (*run)(const Call&, const Share&, const T* packed, const Scratch<T>&);
};

// One instruction set's build of the kernels of one cell.
template <class T>
struct Kernels {
  int saved;  // N
  Kernel<T, Forward<T>> forward;
  Kernel<T, Backward<T>> backward;
  // adds up what the shares have left at the front of their values: the gradients of weights and biases
  void (*reduce)(const Backward<T>&, const T* const* shares, int n_shares, int part, int parts);
};

constexpr int kCells = 4;  // rnn_tanh, rnn_relu, gru, lstm

// Each of kCells.
struct InstructionSet {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<float>* bf16;  // weights are bfloat16, and products take bfloat16 if there is an instruction
};

extern const InstructionSet kBaseline;
#ifdef __x86_64__
extern const InstructionSet kAvx2, kAvx512, kAvx512Bf16;
// what takes no bfloat16 both have
extern const Kernels<float> kAvx512F32[kCells];
extern const Kernels<double> kAvx512F64[kCells];
#endif

// Those that this machine has, the best first, and the one in use.
std::vector<const InstructionSet*> instruction_sets();
const InstructionSet*& instruction_set();

// Runs a pass, or its gradient, on `threads` threads.
template <class T>
void forward(const Kernels<T>&, const Forward<T>&, int threads);
template <class T>
void backward(const Kernels<T>&, const Backward<T>&, int threads);

}  // namespace sire_fast
