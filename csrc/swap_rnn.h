// The recurrent pass with its swapped variants, and its gradient: what goes in and what comes out.
//
// T steps, B sequences, K variants of each, H units; G gates, S states (h, or h and c) and N kept values by
// cell. Variant v = b * K + k of sequence b exchanges positions i and j, 0 <= i <= j <= end < length, and is
// followed to step `end`. It shares the original's states up to i - 1, so it is only run over its span
// i..end; a variant with i == j is the original and is not run at all.
#pragma once

#include <cstdint>
#include <vector>

namespace sire_fast {

struct Sizes {
  int64_t T, B, K, H;
};

struct Swaps {
  const int64_t* swaps;    // (B, K, 2) pairs i, j
  const int64_t* ends;     // (B, K)
  const int64_t* lengths;  // (B)
};

template <class T>
struct Forward {
  Sizes size;
  bool train;         // keep gates and spans
  const T* x_proj;    // (T, B, G*H)
  const T* w_hh;      // (G*H, H)
  const T* b_hh;      // (G*H) or null
  const T* start[2];  // h0, c0: (B, H); c0 is null where S = 1
  Swaps swaps;
  T* states[2];    // output and cells: (T, B, H), 0 beyond a sequence's length
  T* last[2];      // h_n, c_n: (B, H)
  T* variants[2];  // variants, variant_cells: (B, K, H)
  T* penalty;      // (B, K)
  T* gates;        // (T, B, N*H), 0 beyond a sequence's length, if train
  T* spans;        // a row of (S + N)*H, states and gates, for each step of each span, if train
};

template <class T>
struct Backward {
  Sizes size;
  const T* d_states[2];    // (T, B, H); each of these gradients may be null for zero
  const T* d_last[2];      // (B, H)
  const T* d_variants[2];  // (B, K, H)
  const T* d_penalty;      // (B, K)
  const T* w_hh;           // what the forward was given ...
  const T* start[2];
  Swaps swaps;
  const T* states[2];  // ... and what it kept
  const T* gates;
  const T* spans;
  T* dx_proj;     // (T, B, G*H); each of the results may be null if it is not wanted
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
  Schedule schedule;   // of this share's variants alone
};

// How much of what a share needs to work in, by cell, for its caller to allocate.
struct Workspace {
  int64_t values, pointers, numbers;
};

// One instruction set's build of the kernels.
template <class T>
struct Kernels {
  int gates, saved;                        // G and N of the cell
  int64_t (*packed_values)(const Sizes&);  // size of the packed weights
  void (*pack_forward)(const Forward<T>&, T* packed);
  void (*pack_backward)(const Backward<T>&, T* packed);
  Workspace (*forward_workspace)(const Sizes&, const Share&);
  Workspace (*backward_workspace)(const Sizes&, const Share&);
  void (*forward)(const Forward<T>&, const Share&, const T* packed, T* values, int64_t* numbers);
  // leaves the share's part of dW_hh, (G*H, weight_stride), and of db_hh, (G*H), at the front of `values`
  void (*backward)(const Backward<T>&, const Share&, const T* packed, T* values, T** pointers,
                   int64_t* numbers);
  int64_t (*weight_stride)(const Sizes&);
};

constexpr int kCells = 4;  // rnn_tanh, rnn_relu, gru, lstm

struct InstructionSet {
  const char* name;
  Kernels<float> f32[kCells];
  Kernels<double> f64[kCells];
};

extern const InstructionSet kBaseline;
#ifdef __x86_64__
extern const InstructionSet kAvx2, kAvx512;
#endif

// Those that this machine has, the best first, and the one in use.
std::vector<const InstructionSet*> instruction_sets();
const InstructionSet*& instruction_set();

// Runs a pass, or its gradient, on `threads` threads.
template <class T>
void forward(int cell, const Forward<T>&, int threads);
template <class T>
void backward(int cell, const Backward<T>&, int threads);

}  // namespace sire_fast
