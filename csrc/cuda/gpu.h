// The few things of a GPU that the kernels use, each behind one name; tests/gpu_on_host.h has the same for a
// CPU.
#pragma once

#ifndef __CUDACC__
#include "gpu_on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define SIRE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define SIRE_HOST_DEVICE __host__ __device__ __forceinline__
#define SIRE_DEVICE __device__ __forceinline__
// A loop that is unrolled, so that what it indexes can stay in registers.
#define SIRE_EACH(n, count) _Pragma("unroll") for (int n = 0; n < (count); ++n)
#define SIRE_ROLLED _Pragma("unroll 1")

namespace sire_fast::gpu {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

SIRE_DEVICE int thread() { return int(threadIdx.x); }
SIRE_DEVICE int threads() { return int(blockDim.x); }
SIRE_DEVICE int block() { return int(blockIdx.x); }

// All dynamic shared memory of the block, at 16 bytes.
SIRE_DEVICE char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

SIRE_DEVICE void barrier() { __syncthreads(); }
SIRE_DEVICE void warp_barrier() { __syncwarp(); }

// Orders what the blocks of a cluster have written, to shared and to global memory.
SIRE_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // .aligned: whoever has waited in a loop may come apart
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What comes from the other blocks of a cluster: an mbarrier, in shared memory, for one phase after the
// other. A phase ends when one thread has told how many bytes it is to bring, and they have come; they may
// come before that is told. Phases are told apart by their parity, 0 first. Source: PTX ISA, "mbarrier",
// "st.async".
using Arrivals = uint64_t;

SIRE_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// By one thread; others, and other blocks, may use it behind a barrier of the cluster.
SIRE_DEVICE void begin_arrivals(Arrivals* at) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(at))
      : "memory");
#endif
}

SIRE_DEVICE void expect_arrivals(Arrivals* at, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
               : "memory");
#endif
}

SIRE_DEVICE void wait_for_arrivals(const Arrivals* at, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t ended;
  do
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(at)), "r"(parity)
        : "memory");
  while (!ended);
#endif
}

// Starts to store 16 bytes in another block of the cluster: to and arrivals are what lies there in this
// block.
SIRE_DEVICE void send(void* to, Arrivals* arrivals, int rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 to, arrivals;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 arrivals, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [arrivals];\n}" ::
          "r"(shared_address(to)),
      "r"(shared_address(arrivals)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
#endif
}

// Tells all blocks how far this one has come, and with it, behind a barrier, what its threads have written.
SIRE_DEVICE void publish(uint32_t* to, uint32_t count) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(count) : "memory");
}

// Waits until another block has come as far.
SIRE_DEVICE void wait_for(const uint32_t* from, uint32_t count) {
  uint32_t found;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(from) : "memory");
  while (found < count);
}

// Memory as values of another type, at a multiple of their size.
template <class To, class From>
SIRE_DEVICE To* aligned(From* from) {
  return reinterpret_cast<To*>(from);
}

// Starts to copy 4, 8 or 16 bytes from global to shared memory, both at a multiple of as many.
template <int kBytes>
SIRE_DEVICE void copy_async(void* to, const void* from) {
  const uint32_t address = shared_address(to);
  if constexpr (kBytes == 16)  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
                 : "memory");
}

// Waits for what this thread has started to copy; others see it behind a barrier.
SIRE_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

SIRE_DEVICE float warp_sum(float x) {
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
  return x;
}

// Bit l tells what lane l of the warp says.
SIRE_DEVICE uint32_t ballot(bool says) { return __ballot_sync(0xffffffff, says); }
SIRE_DEVICE int first_bit(uint32_t x) { return __ffs(int(x)) - 1; }

SIRE_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
SIRE_DEVICE uint32_t bits(Bfloat16 x) { return __bfloat16_as_ushort(x); }
SIRE_DEVICE uint32_t bits(Float16 x) { return __half_as_ushort(x); }
SIRE_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }
// The bits of two numbers of 16 bits.
SIRE_DEVICE uint32_t bits_of_two(const float (&x)[2], Bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(x[0], x[1]);
  return bits(two.y) << 16 | bits(two.x);
}
SIRE_DEVICE uint32_t bits_of_two(const float (&x)[2], Float16) {
  const __half2 two = __floats2half2_rn(x[0], x[1]);
  return bits(two.y) << 16 | bits(two.x);
}
// Rounds to TF32, where it stands: taken out of a loop, the two halves of what stays in registers would not
// fit there.
SIRE_DEVICE float to_tf32(float x) {
  uint32_t rounded;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return from_bits(rounded);
}
// The same of bits, in fewer instructions: a NaN may become 0, what it is more than that stays one.
SIRE_DEVICE uint32_t bits_to_tf32(uint32_t x) {
  uint32_t rounded;
  asm volatile("{\n.reg .b32 sum;\nadd.u32 sum, %1, 0x1000;\nand.b32 %0, sum, 0xffffe000;\n}"
               : "=r"(rounded)
               : "r"(x));
  return rounded;
}

// Reads the words of b for one or two tiles of rows, see below, from shared memory. Lane l tells where the
// four words begin that the lanes of row l % 8 get, of tile l / 16, from word 4 (l / 8 % 2) on. Source: PTX
// ISA, "ldmatrix".
template <int kTiles>
SIRE_DEVICE void load_fragments(uint32_t (&b)[2][2], const uint32_t* words) {
  if constexpr (kTiles == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0][0]), "=r"(b[0][1]), "=r"(b[1][0]), "=r"(b[1][1])
                 : "r"(shared_address(words))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b[0][0]), "=r"(b[0][1])
                 : "r"(shared_address(words))
                 : "memory");
}

// d += a b on the matrix unit of a warp, m16n8k16, or m16n8k8 in TF32: words of 32 bits hold two neighbouring
// factors along the sum, or one. Lane 4 l + q holds of a the words (row l, word q), (l + 8, q), (l, q + 4)
// and (l + 8, q + 4), of b those of column l, words q and q + 4, and of d the rows l, l, l + 8, l + 8 of
// columns 2 q and 2 q + 1 in turn. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "...
// mma.m16n8k8".
#define SIRE_MMA(name, type, shape)                                                                  \
  SIRE_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], type) {       \
    asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
  }
SIRE_MMA(mma, Bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
SIRE_MMA(mma, Float16, "m16n8k16.row.col.f32.f16.f16.f32")
SIRE_MMA(mma, float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef SIRE_MMA

SIRE_DEVICE float exp(float x) { return expf(x); }
SIRE_DEVICE float tanh(float x) { return tanhf(x); }
// Instructions of one turn: to 22 bits and more, results below 2^-126 are 0; and tanh to 11 bits.
#define SIRE_FUNCTION(name, instruction)                \
  SIRE_DEVICE float name(float x) {                     \
    float value;                                        \
    asm(instruction " %0, %1;" : "=f"(value) : "f"(x)); \
    return value;                                       \
  }
SIRE_FUNCTION(exp2, "ex2.approx.ftz.f32")
SIRE_FUNCTION(reciprocal, "rcp.approx.ftz.f32")
SIRE_FUNCTION(tanh_to_11_bits, "tanh.approx.f32")
#undef SIRE_FUNCTION

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("cuda: ") + cudaGetErrorString(error));
}

struct Grid {
  int64_t blocks;
  int threads;       // of a block
  int64_t shared;    // bytes of a block
  int cluster;       // blocks that reach each other's shared memory
  bool cooperative;  // all blocks run at once
};

// What a kernel is started with.
struct Configuration {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  Configuration(const void* kernel, const Grid& grid, uintptr_t stream) {
    // all that there is: a smaller limit would also be that of other sizes of H, which a graph may hold
    int device, most;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    if (grid.cluster > 8)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (grid.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    }
    if (grid.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
};

// Starts a kernel on a stream.
template <class Call>
void launch(void (*kernel)(Call), const Grid& grid, uintptr_t stream, const Call& call) {
  const Configuration with(reinterpret_cast<const void*>(kernel), grid, stream);
  check(cudaLaunchKernelEx(&with.config, kernel, call));
}

// How many clusters of a kernel the current device runs at once: fewer than its processors would make, where
// some of these have no neighbours left; 0 where it has no clusters of that size.
template <class Call>
int clusters_at_once(void (*kernel)(Call), const Grid& grid) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const Configuration with(function, grid, 0);
  int count = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, function, &with.config);
  if (error != cudaErrorInvalidClusterSize) check(error);
  return error == cudaSuccess ? count : 0;
}

// The versions of CUDA that the driver knows, 0 without one, and that this was built with: 13000 is 13.0.
inline int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
inline int runtime_version() { return CUDART_VERSION; }

}  // namespace sire_fast::gpu

#endif  // __CUDACC__

namespace sire_fast::cuda {
using namespace gpu;  // of whichever it was
}
