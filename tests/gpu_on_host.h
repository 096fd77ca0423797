// csrc/cuda/gpu.h for a CPU: threads of a block are fibers of one thread, which change at every barrier, so
// that what the kernels compute, and where they read and write, can be tested without a GPU, under
// AddressSanitizer too.
//
// Clusters run one after the other, the blocks of one, or of a cooperative grid, together, in an order that
// changes: whole blocks, or warps of them, as far as they come before the next, and so do the lanes of a
// warp. Memory is handed out full of NaN and exactly as large as asked for. What is copied asynchronously
// arrives at once, or when it is waited for; what is sent to another block, in any order and arbitrarily
// late. A barrier that some threads do not reach is an error, and so is an address that is no multiple of
// what is moved there.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define SIRE_KERNEL(threads) inline void
#define SIRE_HOST_DEVICE inline
#define SIRE_DEVICE inline
#define SIRE_EACH(n, count) for (int n = 0; n < (count); ++n)
#define SIRE_ROLLED

struct uint4 {
  uint32_t x, y, z, w;
};

namespace sire_fast::gpu {

inline float from_bits(uint32_t x) {
  float value;
  std::memcpy(&value, &x, 4);
  return value;
}
inline uint32_t bits(float x) {
  uint32_t value;
  std::memcpy(&value, &x, 4);
  return value;
}

struct Bfloat16 {
  uint16_t value;
  Bfloat16() = default;
  explicit Bfloat16(float x) {
    const uint32_t b = bits(x);
    value = uint16_t(std::isnan(x) ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  operator float() const { return from_bits(uint32_t(value) << 16); }
};
inline uint32_t bits(Bfloat16 x) { return x.value; }

struct Float16 {
  _Float16 value;
  Float16() = default;
  explicit Float16(float x) : value(_Float16(x)) {}
  operator float() const { return float(value); }
};
inline uint32_t bits(Float16 x) {
  uint16_t value;
  std::memcpy(&value, &x, 2);
  return value;
}

// ------------------------------------------------------------------ fibers

// Where fibers wait for each other.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait();

 private:
  int size_, arrived_ = 0, opened_ = 0;
};

struct Warp {
  Barrier barrier{32};
  uint32_t words[2][32][6];  // what the lanes bring to an exchange, in turns
};

struct Block {
  int number, rank;
  std::unique_ptr<char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
  int running;  // threads that have begun and not ended
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// What comes from other blocks of a cluster: a phase ends when one thread has told the bytes of it and they
// have come.
struct Arrivals {
  int32_t missing;  // bytes, less those that came before they were told
  uint16_t told, parity;
};

struct Sent {  // and not yet there
  Block* block;
  int64_t to, arrivals;  // in its shared memory
  uint4 value;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int thread;
  int turn;  // of its warp's exchanges
  bool done;
  std::vector<Copy> copies;  // that have started
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // of the cluster that runs
  std::unique_ptr<Barrier> cluster;
  std::function<void()> kernel;
  ucontext_t host;
  const void* host_stack;
  size_t host_stack_size;
  Fiber* current;
  std::exception_ptr error;
  int threads;
  std::minstd_rand random;
  int clusters = 1 << 20;  // that a test lets run at once
  std::vector<Sent> sent;
  int64_t progress;  // barriers that have opened, counts that were published and fibers that have ended
};
inline Machine machine;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 1 << 18;
#else
constexpr size_t kStack = 1 << 16;
#endif

// Both switches tell AddressSanitizer whose stack comes next.
inline void run(Fiber& fiber) {
  machine.current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  void* own;
  __sanitizer_start_switch_fiber(&own, fiber.stack.get(), kStack);
#endif
  swapcontext(&machine.host, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
}

inline void leave(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  void* own;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &own, machine.host_stack, machine.host_stack_size);
#endif
  swapcontext(&fiber.context, &machine.host);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

inline void begin() {
  Fiber& fiber = *machine.current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.host_stack, &machine.host_stack_size);
#endif
  ++fiber.block->running;
  try {
    machine.kernel();
  } catch (...) {
    machine.error = std::current_exception();
  }
  --fiber.block->running;
  fiber.done = true;
  ++machine.progress;
  leave(fiber);
}

inline void Barrier::wait() {
  const int before = opened_;
  if (++arrived_ == size_) {
    arrived_ = 0;
    ++opened_;
    ++machine.progress;
  }
  while (opened_ == before) leave(*machine.current);
}

inline void arrive();

inline void run_cluster(int first_block, int cluster, size_t shared) {
  machine.blocks.clear();
  machine.sent.clear();
  machine.cluster = std::make_unique<Barrier>(cluster * machine.threads);
  for (int rank = 0; rank < cluster; ++rank) {
    Block block{first_block + rank, rank, std::make_unique<char[]>(shared), Barrier(machine.threads), {}, 0};
    std::memset(block.shared.get(), 0xff, shared);
    block.warps.resize(size_t(machine.threads) / 32);
    machine.blocks.push_back(std::move(block));
  }
  machine.fibers.resize(size_t(cluster * machine.threads));
  for (size_t n = 0; n < machine.fibers.size(); ++n) {
    Fiber& fiber = machine.fibers[n];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
    fiber.block = &machine.blocks[n / size_t(machine.threads)];
    fiber.thread = int(n) % machine.threads;
    fiber.turn = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, begin, 0);
  }
  // whole blocks, and single warps, in any order
  std::vector<std::pair<int, int>> units;
  for (int first = 0; first < cluster * machine.threads; first += 32) units.push_back({first, first + 32});
  for (int rank = 0; rank < cluster; ++rank)
    units.push_back({rank * machine.threads, (rank + 1) * machine.threads});
  for (int64_t before = -1; before != machine.progress;) {
    before = machine.progress;
    std::shuffle(units.begin(), units.end(), machine.random);
    for (const auto& [first, end] : units) {
      arrive();
      for (int64_t once = -1; once != machine.progress;) {
        once = machine.progress;
        const int lanes = int(machine.random() % 32);
        for (int n = first; n < end; ++n) {
          Fiber& fiber = machine.fibers[size_t(n ^ lanes)];
          if (!fiber.done) run(fiber);
        }
      }
    }
  }
  for (const Fiber& fiber : machine.fibers)
    if (!fiber.done) throw std::runtime_error("gpu_on_host: a barrier that some threads do not reach");
}

// ------------------------------------------------------------------ gpu.h

inline int thread() { return machine.current->thread; }
inline int threads() { return machine.threads; }
inline int block() { return machine.current->block->number; }
inline char* shared_memory() { return machine.current->block->shared.get(); }

inline Warp& warp() { return machine.current->block->warps[size_t(thread()) / 32]; }
inline void barrier() { machine.current->block->barrier.wait(); }
inline void warp_barrier() { warp().barrier.wait(); }
inline void cluster_barrier() { machine.cluster->wait(); }

inline void check_address(const void* address, size_t multiple) {
  if (reinterpret_cast<uintptr_t>(address) % multiple)
    throw std::runtime_error("gpu_on_host: an address that is no multiple of what is moved there");
}
template <class To, class From>
To* aligned(From* from) {
  check_address(from, alignof(To) > sizeof(To) ? alignof(To) : sizeof(To));
  return reinterpret_cast<To*>(from);
}

inline void begin_arrivals(Arrivals* at) { *at = {0, 0, 0}; }

inline void end_phase(Arrivals& at) {
  if (!at.told || at.missing) return;
  at = {0, 0, uint16_t(1 - at.parity)};
  ++machine.progress;
}

inline void expect_arrivals(Arrivals* at, int bytes) {
  if (at->told) throw std::runtime_error("gpu_on_host: a phase that has not ended is told to begin again");
  at->told = 1;
  at->missing += bytes;
  end_phase(*at);
}

inline void wait_for_arrivals(const Arrivals* at, uint32_t parity) {
  while (at->parity == parity) leave(*machine.current);
}

inline void send(void* to, Arrivals* arrivals, int rank, uint4 value) {
  check_address(to, 16);
  const auto offset = [](void* p) { return static_cast<char*>(p) - shared_memory(); };
  machine.sent.push_back({&machine.blocks[size_t(rank)], offset(to), offset(arrivals), value});
  ++machine.progress;
}

// Some of what was sent arrives, the oldest in any case, so that all of it does.
inline void arrive() {
  std::vector<Sent> later;
  for (const Sent& sent : machine.sent) {
    if (&sent != machine.sent.data() && machine.random() % 2) {
      later.push_back(sent);
      continue;
    }
    if (!sent.block->running)
      throw std::runtime_error("gpu_on_host: a block that has not begun, or has ended, is written to");
    std::memcpy(sent.block->shared.get() + sent.to, &sent.value, sizeof sent.value);
    auto& at = *reinterpret_cast<Arrivals*>(sent.block->shared.get() + sent.arrivals);
    at.missing -= int32_t(sizeof sent.value);
    end_phase(at);
    ++machine.progress;
  }
  machine.sent = std::move(later);
}

inline void publish(uint32_t* to, uint32_t count) {
  *to = count;
  ++machine.progress;
}
inline void wait_for(const uint32_t* from, uint32_t count) {
  while (*from < count) leave(*machine.current);
}

template <int kBytes>
void copy_async(void* to, const void* from) {
  check_address(to, kBytes);
  check_address(from, kBytes);
  if (machine.random() % 2)
    std::memcpy(to, from, kBytes);
  else
    machine.current->copies.push_back({to, from, kBytes});
}
inline void wait_for_copies() {
  for (const Copy& copy : machine.current->copies) std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  machine.current->copies.clear();
}

// Where the lanes of a warp find what they have brought, once all have.
inline uint32_t (*exchanged())[6] {
  Fiber& fiber = *machine.current;
  fiber.turn = 1 - fiber.turn;
  return warp().words[fiber.turn];
}

template <class E>
uint32_t bits_of_two(const float (&x)[2], E) {
  return bits(E(x[1])) << 16 | bits(E(x[0]));
}

inline float warp_sum(float x) {
  auto* words = exchanged();
  words[thread() % 32][0] = bits(x);
  warp_barrier();
  float total = 0;
  for (int lane = 0; lane < 32; ++lane) total += from_bits(words[lane][0]);
  return total;
}

inline uint32_t ballot(bool says) {
  auto* words = exchanged();
  words[thread() % 32][0] = says;
  warp_barrier();
  uint32_t all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= words[lane][0] << lane;
  return all;
}
inline int first_bit(uint32_t x) { return __builtin_ctz(x); }

template <int kTiles>
void load_fragments(uint32_t (&b)[2][2], const uint32_t* from) {
  check_address(from, 16);
  auto* words = exchanged();
  const int lane = thread() % 32;
  std::memcpy(words[lane], from, 16);
  warp_barrier();
  for (int matrix = 0; matrix < 2 * kTiles; ++matrix)
    b[matrix / 2][matrix % 2] = words[8 * matrix + lane / 4][lane % 4];
}

// The matrix unit reads 10 bits behind the point, and cuts its sums off to float32.
inline float to_tf32(float x) { return std::isnan(x) ? x : from_bits((bits(x) + 0x1000) & 0xffffe000); }

inline uint32_t bits_to_tf32(uint32_t x) { return (x + 0x1000) & 0xffffe000; }

inline double dot(uint32_t a, uint32_t b, float) {
  return double(from_bits(a & 0xffffe000)) * double(from_bits(b & 0xffffe000));
}
template <class E>
double dot(uint32_t a, uint32_t b, E) {
  const auto factor = [](uint32_t word, int half) {
    const uint16_t bits = uint16_t(word >> 16 * half);
    E value;
    std::memcpy(&value, &bits, 2);
    return double(float(value));
  };
  return factor(a, 0) * factor(b, 0) + factor(a, 1) * factor(b, 1);
}

inline float cut_off(double x) {
  const float rounded = float(x);
  return std::fabs(double(rounded)) > std::fabs(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

template <class E>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], E dtype) {
  auto* words = exchanged();
  const int lane = thread() % 32;
  std::memcpy(words[lane], a, sizeof a);
  std::memcpy(words[lane] + 4, b, sizeof b);
  warp_barrier();
  for (int e = 0; e < 4; ++e) {
    const int column = lane % 4 * 2 + e % 2;
    double total = d[e];
    for (int k = 0; k < 8; ++k) {
      const uint32_t* of_a = words[lane / 4 * 4 + k % 4];
      const uint32_t* of_b = words[column * 4 + k % 4];
      total += dot(of_a[e / 2 + k / 4 * 2], of_b[4 + k / 4], dtype);
    }
    d[e] = cut_off(total);
  }
}

inline float exp(float x) { return std::exp(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float exp2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline float tanh_to_11_bits(float x) { return from_bits((bits(std::tanh(x)) + 0x1000) & 0xffffe000); }

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared;
  int cluster;
  bool cooperative;
};

template <class Call>
void launch(void (*kernel)(Call), const Grid& grid, uintptr_t, const Call& call) {
  machine.kernel = [&] { kernel(call); };
  machine.threads = grid.threads;
  const int together = grid.cooperative ? int(grid.blocks) : grid.cluster;
  for (int64_t block = 0; block < grid.blocks; block += together)
    run_cluster(int(block), together, size_t(grid.shared));
}

template <class Call>
int clusters_at_once(void (*)(Call), const Grid&) {
  return machine.clusters;
}
inline int driver_version() { return 13000; }
inline int runtime_version() { return 13000; }

}  // namespace sire_fast::gpu
