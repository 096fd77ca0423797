// One call on the CPU: who does which sequences, on which threads, with which instruction set's kernels.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"
#include "swap_rnn.h"

namespace sire_fast {

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> sets;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&kAvx512Bf16);
  if (__builtin_cpu_supports("avx512f")) sets.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&kAvx2);
#endif
  sets.push_back(&kBaseline);
  return sets;
}

namespace {

// The best of this machine within the limit that a user sets for torch: one for both.
const InstructionSet* best() {
  const char* const given = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = given ? given : "";
  const std::string beyond = limit == "default" ? "Avx" : limit == "avx2" ? "Avx512" : "none";
  const auto sets = instruction_sets();
  return *std::find_if(sets.begin(), sets.end(), [&](const InstructionSet* set) {  // the last one always does
    return std::string(set->name).rfind(beyond, 0) != 0;
  });
}

}  // namespace

const InstructionSet*& instruction_set() {
  static const InstructionSet* current = best();
  return current;
}

namespace {

// Runs work(0) .. work(n - 1) on n threads. They are those of the OpenMP runtime that torch has loaded, if it
// can be found: a second pool would spin against torch's for the same cores.
template <class F>
void parallel(int n, const F& work) {
  struct Job {
    const F& work;
    int n;
    std::atomic<int> next{0};
    static void run(void* self) {
      Job& job = *static_cast<Job*>(self);
      for (int k; (k = job.next++) < job.n;) job.work(k);
    }
  } job{work, n};
  using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto gomp_parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (n == 1) {
    Job::run(&job);
  } else if (gomp_parallel) {
    gomp_parallel(Job::run, &job, n, 0);
  } else {
    std::vector<std::thread> others;
    for (int k = 1; k < n; ++k) others.emplace_back(Job::run, &job);
    Job::run(&job);
    for (auto& thread : others) thread.join();
  }
}

// The shares of a call and the memory behind their schedules.
class Plan {
 public:
  Plan(const Sizes& z, const Swaps& s, int threads)
      : by_start_(z.B * z.K), by_end_(z.B * z.K), first_row_(z.B * z.K) {
    std::vector<int64_t> cost(z.B + 1);  // steps of the sequences before b and of their variants
    int64_t row = 0;
    for (int64_t b = 0; b < z.B; ++b) {
      const int64_t before = row;
      for (int64_t v = b * z.K; v < (b + 1) * z.K; ++v) {
        first_row_[v] = row;
        if (s.swaps[2 * v] < s.swaps[2 * v + 1]) row += s.ends[v] - s.swaps[2 * v] + 1;
      }
      cost[b + 1] = cost[b] + s.lengths[b] + row - before;
    }
    const int64_t n = std::min<int64_t>(std::max(threads, 1), z.B);
    begins_.reserve(2 * n * (z.T + 1));  // the schedules point into it
    int64_t begin = 0;
    for (int64_t k = 1; k <= n; ++k) {
      // the sequence at which the k-th part of the cost is reached, with at least one for each share
      int64_t end = std::lower_bound(cost.begin(), cost.end(), cost.back() * k / n) - cost.begin();
      end = std::clamp(end, begin + 1, z.B - (n - k));
      add_share(z, s, begin, k == n ? z.B : end);
      begin = end;
    }
  }

  std::vector<Share> shares;

 private:
  void add_share(const Sizes& z, const Swaps& s, int64_t begin, int64_t end) {
    int64_t* start_begin = begins_.data() + begins_.size();
    int64_t* end_begin = start_begin + z.T + 1;
    begins_.resize(begins_.size() + 2 * (z.T + 1));
    std::vector<int64_t> rows(z.T + 1);  // how many more originals and running variants at t than at t - 1
    Share share{begin,
                end,
                0,
                0,
                0,
                {by_start_.data() + begin * z.K, start_begin, by_end_.data() + begin * z.K, end_begin,
                 first_row_.data()}};
    for (int64_t b = begin; b < end; ++b) {
      share.steps = std::max(share.steps, s.lengths[b]);
      ++rows[0];
      --rows[s.lengths[b]];
    }
    const auto runs = [&](int64_t v) { return s.swaps[2 * v] < s.swaps[2 * v + 1]; };
    for (int64_t v = begin * z.K; v < end * z.K; ++v) {
      ++end_begin[s.ends[v] + 1];
      if (!runs(v)) continue;
      share.reach = std::max(share.reach, s.swaps[2 * v + 1] - s.swaps[2 * v]);
      ++start_begin[s.swaps[2 * v] + 1];
      ++rows[s.swaps[2 * v]];
      --rows[s.ends[v] + 1];
    }
    int64_t running = 0;
    for (int64_t t = 0; t < z.T; ++t) {
      start_begin[t + 1] += start_begin[t];
      end_begin[t + 1] += end_begin[t];
      running += rows[t];
      share.rows = std::max(share.rows, running);
    }
    std::vector<int64_t> next_start(start_begin, start_begin + z.T), next_end(end_begin, end_begin + z.T);
    for (int64_t v = begin * z.K; v < end * z.K; ++v) {
      if (runs(v)) by_start_[begin * z.K + next_start[s.swaps[2 * v]]++] = v;
      by_end_[begin * z.K + next_end[s.ends[v]]++] = v;
    }
    shares.push_back(share);
  }

  std::vector<int64_t> by_start_, by_end_, first_row_, begins_;
};

// Runs all shares of a call, each in memory of its own, and then `after` on what they have left at the front
// of it.
template <class T, class Call, class F>
void run(const Kernel<T, Call>& kernel, const Call& call, int threads, const F& after) {
  const Plan plan(call.size, call.swaps, threads);
  const int n_shares = int(plan.shares.size());

  // In one piece: for what many small ones cost, and for huge pages.
  size_t bytes = 0;
  const auto place = [&](int64_t n, size_t size) {
    const size_t at = bytes;
    bytes += (n * size + Memory::kLine - 1) / Memory::kLine * Memory::kLine;
    return at;
  };
  place(kernel.packed(call), sizeof(T));
  std::vector<std::array<size_t, 3>> places;
  for (const Share& share : plan.shares) {
    const Workspace space = kernel.workspace(call, share);
    places.push_back({place(space.values, sizeof(T)), place(space.pointers, sizeof(T*)),
                      place(space.numbers, sizeof(int64_t))});
  }
  const Memory memory(bytes);
  char* at = static_cast<char*>(memory.get());
  T* packed = reinterpret_cast<T*>(at);
  std::vector<Scratch<T>> scratch;
  for (const auto& [values, pointers, numbers] : places)
    scratch.push_back({reinterpret_cast<T*>(at + values), reinterpret_cast<T**>(at + pointers),
                       reinterpret_cast<int64_t*>(at + numbers)});

  parallel(n_shares, [&](int n) { kernel.pack(call, n, n_shares, packed); });
  parallel(n_shares, [&](int n) { kernel.run(call, plan.shares[n], packed, scratch[n]); });
  after(scratch);
}

}  // namespace

template <class T>
void forward(const Kernels<T>& kernels, const Forward<T>& f, int threads) {
  run(kernels.forward, f, threads, [](const std::vector<Scratch<T>>&) {});
}

template <class T>
void backward(const Kernels<T>& kernels, const Backward<T>& g, int threads) {
  run(kernels.backward, g, threads, [&](const std::vector<Scratch<T>>& scratch) {
    std::vector<const T*> shares;
    for (const Scratch<T>& share : scratch) shares.push_back(share.values);
    const int n_shares = int(shares.size());
    parallel(n_shares, [&](int n) { kernels.reduce(g, shares.data(), n_shares, n, n_shares); });
  });
}

template void forward(const Kernels<float>&, const Forward<float>&, int);
template void forward(const Kernels<double>&, const Forward<double>&, int);
template void backward(const Kernels<float>&, const Backward<float>&, int);
template void backward(const Kernels<double>&, const Backward<double>&, int);

}  // namespace sire_fast
