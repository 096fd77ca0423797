// Memory that a call works in, and the large part of what it keeps for its gradient.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace sire_fast {

// Not initialised; starts at a cache line. Large memory is kept when it is given back, for the next call:
// each of its pages costs as much time when it is new as a few rows take to compute. The system may have most
// of it when it runs short. What a call works in is whole huge pages, of which it needs few; what is lent to
// a caller, who may hold a lot of it for long, fits more tightly.
class Memory {
 public:
  static constexpr size_t kLine = 64, kLarge = size_t(1) << 20;

  explicit Memory(size_t bytes, bool lent = false)
      : block_(bytes < kLarge ? small(bytes) : large(bytes, lent)) {}
  ~Memory() {
    if (block_.bytes < kLarge)
      std::free(block_.p);
    else
      give(block_);
  }
  Memory(const Memory&) = delete;

  void* get() const { return block_.p; }
  size_t bytes() const { return block_.bytes; }

 private:
  struct Block {
    void* p = nullptr;
    size_t bytes = 0;
    int64_t given = 0;  // number of the call of large() before which it was given back
  };

  struct Pool {
    std::mutex mutex;
    std::vector<Block> free;
    int64_t taken = 0, blocks = 0;  // calls of large(), and blocks that it has from the system
  };

  static constexpr size_t kHuge = size_t(2) << 20;
  // To offer a block to the system interrupts all threads, which costs as much as some steps of a small
  // layer: some of up to this size are not offered.
  static constexpr size_t kSpared = 4 * kHuge, kSparedBlocks = 8;
  // calls of large(), for each block that there is, after which one that nobody wants goes back to the system
  static constexpr int64_t kUnused = 16;

  static Pool& pool() {
    static Pool& pool = []() -> Pool& {
      // a process that is forked must not find the mutex in the hands of a thread that it does not have
      pthread_atfork([] { Memory::pool().mutex.lock(); }, [] { Memory::pool().mutex.unlock(); },
                     [] { Memory::pool().mutex.unlock(); });
      return *new Pool;  // outlives what other libraries hold at exit
    }();
    return pool;
  }

  // As torch tells it: programs that then try smaller batches look for these words.
  [[noreturn]] static void fail(size_t bytes) {
    throw std::runtime_error("sire_fast: DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                             std::to_string(bytes) + " bytes");
  }

  // Gives blocks that nobody holds back to the system, from one on; the pool is locked.
  static void unmap(Pool& at, std::vector<Block>::iterator first) {
    for (auto b = first; b != at.free.end(); ++b) munmap(b->p, b->bytes);
    at.blocks -= at.free.end() - first;
    at.free.erase(first, at.free.end());
  }

  static size_t whole(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

  static Block small(size_t bytes) {
    void* p = std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine);
    if (!p) fail(bytes);
    return {p, bytes};
  }

  // The smallest free block that fits, and is not much larger than a new one, or a new one.
  static Block large(size_t bytes, bool lent) {
    if (bytes > SIZE_MAX / 2) fail(bytes);
    size_t unit = kLarge / 16;
    while (16 * unit < bytes) unit *= 2;
    // the next call may want a little more
    const size_t rounded = lent ? whole(bytes, unit) : whole(bytes + bytes / 8, kHuge);
    const size_t most = lent ? rounded + rounded / 4 : 2 * rounded;
    Pool& at = pool();
    {
      const std::lock_guard<std::mutex> lock(at.mutex);
      ++at.taken;
      const auto old = std::partition(at.free.begin(), at.free.end(), [&](const Block& b) {
        return at.taken - b.given < kUnused * at.blocks;
      });
      unmap(at, old);
      auto best = at.free.end();
      for (auto b = at.free.begin(); b != at.free.end(); ++b)
        if (bytes <= b->bytes && b->bytes <= most && (best == at.free.end() || b->bytes < best->bytes))
          best = b;
      if (best != at.free.end()) {
        const Block found = *best;
        at.free.erase(best);
        return found;
      }
    }
    const auto map = [&] {
      return mmap(nullptr, rounded + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    void* mapped = map();
    if (mapped == MAP_FAILED) {  // a limit of the process's memory counts what is kept too
      {
        const std::lock_guard<std::mutex> lock(at.mutex);
        unmap(at, at.free.begin());
      }
      mapped = map();
    }
    if (mapped == MAP_FAILED) fail(bytes);
    const size_t before = -reinterpret_cast<uintptr_t>(mapped) % kHuge;  // not every kernel aligns it
    char* p = static_cast<char*>(mapped) + before;
    if (before) munmap(mapped, before);
    munmap(p + rounded, kHuge - before);
#ifdef MADV_HUGEPAGE
    madvise(p, rounded, MADV_HUGEPAGE);  // advice: no matter if it is not taken
#endif
    const std::lock_guard<std::mutex> lock(at.mutex);
    ++at.blocks;
    return {p, rounded};
  }

  static void give(Block block) {
    Pool& at = pool();
    const std::lock_guard<std::mutex> lock(at.mutex);
#ifdef MADV_FREE
    if (block.bytes > kSpared || at.free.size() >= kSparedBlocks) madvise(block.p, block.bytes, MADV_FREE);
#endif
    block.given = at.taken;
    at.free.push_back(block);
  }

  Block block_;
};

}  // namespace sire_fast
