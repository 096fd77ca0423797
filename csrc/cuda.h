// The recurrent pass with its swapped variants, and its gradient, on a GPU: what goes in and what comes out.
//
// A cluster of blocks owns N sequences and needs no other. It runs passes over tiles of kRows rows: in the
// first the originals and V variants of each, in lock step; behind it the other variants, each from its own
// start. Variant v = b * K + k keeps row v * S + t - i of its span i..end. T steps, B sequences, K variants
// of each, H units; G gates, STATES states, KEPT kept values and D different gradients of gates by cell.
#pragma once

#include <cstdint>

namespace sire_fast::cuda {

constexpr int kRows = 16;

struct Pass {
  int T, B, K, H;
  int S;          // rows of `spans` for a variant
  int N, V;       // sequences of a tile, and variants of each that run in lock step with it
  int cluster;    // blocks of a tile, between which the units are split
  bool tf32;      // products of float32 may be TF32
  const void* x;  // (T, B, G*H), projected; x, w_hh, b_hh, gates, dx, du and d_spans are in the call's dtype
  const void* w_hh;        // (G*H, H)
  const void* b_hh;        // (G*H) or null
  const float* start[2];   // h0, c0: (B, H); null where STATES = 1, like all pairs here
  const int64_t* swaps;    // (B, K, 2)
  const int64_t* ends;     // (B, K)
  const int64_t* lengths;  // (B)
};

struct Forward : Pass {
  float* states[2];    // output and cells: (T, B, H), 0 beyond a sequence's length
  float* last[2];      // (B, H)
  float* variants[2];  // (B, K, H)
  float* penalty;      // (B, K)
  void* gates;         // (T*B + B*K*S, KEPT*H), the originals' first, or null
  float* spans;        // (B*K*S, STATES*H) or null
};

struct Backward : Pass {
  const float* d_states[2];  // gradients of the results; each may be null for zero
  const float* d_last[2];
  const float* d_variants[2];
  const float* d_penalty;
  const float* states[2];  // what the forward has kept
  const void* gates;
  const float* spans;
  const int64_t* end_times;    // (B, K): the ends of a sequence's variants, the latest first,
  const int64_t* end_order;    // and whose they are
  const int64_t* start_times;  // so for those that start, -1 for the others
  const int64_t* start_order;
  void* dx;        // (T*B, G*H), without what variants owe
  void* du;        // (T*B, G*H), the first steps of variants included
  void* d_spans;   // (B*K*S, D*H): gradients of gates, du's G and, if D > G, dx's last; 0 but behind a first
                   // step
  float* d_first;  // (B*K, (D + STATES)*H): a variant's first step, and what it owes to the states before it
  float* d_start[2];  // (B, H)
};

// Adds to dx what the variants owe to the inputs that they have read.
struct Gather {
  int T, B, K, H, S;
  const int64_t* swaps;
  const int64_t* ends;
  const void* d_spans;
  const float* d_first;
  void* dx;
};

// Barriers one behind the other, of blocks that are alone or in clusters: what a step takes at least.
struct Barriers {
  int count, cluster;
};

enum class Dtype { float32, bfloat16, float16 };
// Blocks that share a tile, the fewest that hold W_hh in their registers; 0 if 16 do not.
int cluster(int H, Dtype);

// Bytes of a block in such a cluster, in the backward, which needs more.
int64_t shared_bytes(int cell, Dtype, int H);

int saved_gates(int cell);  // KEPT
int gradients(int cell);    // D

// Start a kernel on a stream; cells are numbered rnn_tanh, rnn_relu, gru, lstm. Throw std::runtime_error with
// CUDA's own words.
void forward(int cell, Dtype, const Forward&, uintptr_t stream);
void backward(int cell, Dtype, const Backward&, uintptr_t stream);
void gather(int cell, Dtype, const Gather&, uintptr_t stream);
void barriers(const Barriers&, uintptr_t stream);

}  // namespace sire_fast::cuda
