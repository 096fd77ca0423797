// The recurrent pass with its swapped variants, and its gradient, on a GPU: what goes in and what comes out.
//
// A group of blocks, often one alone, takes tiles of N sequences in turns and needs no other group. It runs
// passes over kRows rows: in the first the originals and V variants of each, in lock step; behind it the
// other variants, each from its own start. Variant v = b * K + k keeps row v * S + t - i of its span i..end.
// T steps, B sequences, K variants of each, H units; G gates, STATES states, KEPT kept values and D different
// gradients of gates by cell.
#pragma once

#include <cstdint>

namespace sire_fast::cuda {

constexpr int kRows = 16;

struct Pass {
  int T, B, K, H;
  int S;       // rows of `spans` for a variant; T where none are kept
  int N, V;    // sequences of a tile, and variants of each that run in lock step with it
  int groups;  // that run at once
  int blocks;  // of a group, between which the units are split
  bool tf32;   // products of float32 may be TF32
  // where blocks of a group leave operands to each other, of (groups, mailbox_bytes); null for clusters,
  // whose blocks reach each other's shared memory
  void* mailbox;
  uint32_t* arrived;  // (groups, blocks), how often each has left some; 0 at first
  const void* x;  // (T, B, G*H), projected; x, w_hh, b_hh, gates, dx, du and d_spans are in the call's dtype
  const void* w_hh;        // (G*H, H)
  const void* b_hh;        // (G*H) or null
  const float* start[2];   // h0, c0: (B, H); null where STATES = 1, like all pairs here
  const int64_t* swaps;    // (B, K, 2)
  const int64_t* ends;     // (B, K)
  const int64_t* lengths;  // (B); of these three nobody has checked the values
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
  void* d_spans;   // (B*K*S, D*H): gradients of gates, du's G and, if D > G, dx's last, behind a first step
  float* d_first;  // (B*K, (D + STATES)*H): a variant's first step, and what it owes to the states before it
  float* d_start[2];  // (B, H)
};

// Adds to dx what the variants owe to the inputs that they have read, and writes 0 to the rows of spans and
// d_spans that nobody has written, as far as dW_hh takes them in.
struct Gather {
  int T, B, K, H, S;
  const int64_t* swaps;
  const int64_t* ends;
  float* spans;
  void* d_spans;
  const float* d_first;
  void* dx;
};

// Barriers of a group one behind the other: what a step takes at least.
struct Barriers {
  int count, blocks;
  uint32_t* arrived;  // (blocks), 0 at first; null for a cluster
};

enum class Dtype { float32, bfloat16, float16 };
// The fewest blocks that hold W_hh in their registers; 0 if no number does.
int blocks(int H, Dtype);

// Bytes of a block's shared memory, and of a group's mailbox, in the backward, which needs more.
int64_t shared_bytes(int cell, Dtype, int H, int blocks, bool mailbox);
int64_t mailbox_bytes(int cell, Dtype, int H, int blocks);

// How many clusters of so many blocks the current device runs at once, in either direction; 0 where it has no
// room for one.
int clusters(int cell, Dtype, int H, int blocks);

// Of CUDA: that of the driver, 0 without one, and that with which this was built; 13000 is 13.0.
struct Versions {
  int driver, runtime;
};
Versions versions();

int saved_gates(int cell);  // KEPT
int gradients(int cell);    // D

// Start a kernel on a stream; cells are numbered rnn_tanh, rnn_relu, gru, lstm. Throw std::runtime_error with
// CUDA's own words.
void forward(int cell, Dtype, const Forward&, uintptr_t stream);
void backward(int cell, Dtype, const Backward&, uintptr_t stream);
void gather(int cell, Dtype, const Gather&, uintptr_t stream);
void barriers(const Barriers&, uintptr_t stream);

}  // namespace sire_fast::cuda
