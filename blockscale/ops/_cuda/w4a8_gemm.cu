// out = (a * a_scale) @ (w * w_scale)^T + bias for many rows of a and four-bit w, on SM90: dense and both grouped
// forms.
//
//   a (M, K) E4M3 row-major, a_scale (M, G) column-major, G = ceil(K / 128); words (E, G, N, 16) and w_scale (E, G, N)
//   as reference/w4.py lays them out; out (M, N) bfloat16 or float32. Masked: a, a_scale and out have a leading E.
//   Each 128 of K accumulates in float32 in the tensor cores, then acc = fma(partial * w_scale, a_scale, acc).
//
// A persistent block computes tiles of BM rows of a by BN of w. One thread feeds a ring of STAGES stages (128 of K
// each) through the copy engine; WGS math warpgroups take WAVES x 64 rows of w each, and all rows of a. Rows of w are
// the long side of the tensor cores' instruction, which takes that operand from registers: a thread reads the words
// of its two rows, and what few instructions make of a word *is* two registers of the operand. Unpacked weights are
// never written anywhere, which leaves shared memory to the rows of a.
// How products and promotions follow one another: w4a8_multiply.cuh (UNIT = 0), in two halves of the rows of a, of
// which one is left out if no row of it counts; or w4a8_units.cuh, in four quarters. Warpgroups share nothing but the
// ring.
// CLUSTER = 2: two blocks share the rows of a, each loads half for both.
#include "config.cuh"
#include "common.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;
constexpr int UNIT_M = UNIT != 0 ? UNIT : BM / 2;  // rows of a in one product
constexpr int CHUNKS = BM / UNIT_M;
constexpr int SUMS = UNIT_M / 2;    // registers of 64 x UNIT_M
constexpr int UNIT_N = 64 * WAVES;  // rows of w of a warpgroup
constexpr int BN = UNIT_N * WGS;
constexpr bool SHARE_A = true;
constexpr int SUPER_M = BM, SUPER_N = BN * CLUSTER;  // what a cluster computes
constexpr int LINE = 64;                             // bytes of a row of words
constexpr int A_BYTES = BM * BK, WORD_BYTES = BN * LINE, A_SCALE_BYTES = BM * 4, W_SCALE_BYTES = BN * 4;
constexpr int A_BOX = UNIT != 0 ? UNIT : BM / CLUSTER;  // rows of a in one copy
constexpr int MATH_THREADS = WGS * 128;
constexpr int OUT_SIZE = OUT_F32 ? 4 : 2;
constexpr int STAGED_WAVES = OUT_F32 ? 1 : WAVES;
constexpr int STAGED_BYTES = 64 * BM * OUT_SIZE;  // a wave of a warpgroup
static_assert(BM % 32 == 0 && BM <= 128 && WAVES <= 2 && BM % UNIT_M == 0, "tile shape");

// Rows of an expert, when masked: counts past the end of its rows mean all of them.
__device__ __forceinline__ int rows_of(const Problem& problem, int expert) {
  return min(load_int(problem.layout + expert), problem.m);
}

#include "schedule.cuh"

// Whether any row counts of chunk number `chunk` of UNIT_M rows of a tile. Rows that count stand before those that do
// not, in a segment as in an expert's room: the first row of the chunk tells.
__device__ __forceinline__ bool counts(const Problem& problem, const Tile& tile, int chunk) {
  const int first = tile.m0 + chunk * UNIT_M;
  return KIND == 1 ? load_int(problem.layout + first) >= 0 : first < tile.rows;
}

// How many chunks of a tile count; the first one always does.
__device__ __forceinline__ int chunks_of(const Problem& problem, const Tile& tile) {
  int chunks = 1;
#pragma unroll
  for (int chunk = 1; chunk < CHUNKS; ++chunk) chunks += counts(problem, tile, chunk);
  return chunks;
}

// Shared memory: stages of a, of words, staged waves of out, all 1024-byte aligned for the swizzle; stages of scales;
// barriers.
struct Memory {
  u32 base;

  __device__ __forceinline__ u32 a(int stage) const { return base + stage * A_BYTES; }
  __device__ __forceinline__ u32 words(int stage) const { return base + STAGES * A_BYTES + stage * WORD_BYTES; }
  __device__ __forceinline__ u32 staged() const { return base + STAGES * (A_BYTES + WORD_BYTES); }
  __device__ __forceinline__ u32 a_scale(int stage) const {
    return staged() + WGS * STAGED_WAVES * STAGED_BYTES + stage * A_SCALE_BYTES;
  }
  __device__ __forceinline__ u32 w_scale(int stage) const { return a_scale(STAGES) + stage * W_SCALE_BYTES; }
  __device__ __forceinline__ u32 full(int stage) const { return w_scale(STAGES) + stage * 8; }
  __device__ __forceinline__ u32 empty(int stage) const { return full(stage) + STAGES * 8; }
};

struct Maps {
  const TensorMap *a, *words, *a_scale, *w_scale;
};

__device__ __forceinline__ void feed(const Problem& problem, const Maps& maps, Memory memory) {
  Scheduler scheduler(problem);
  Slot slot;
  Tile tile;
  while (scheduler.take(tile)) {
    const int a_expert = KIND == 2 ? tile.expert : 0, chunks = UNIT != 0 ? chunks_of(problem, tile) : CHUNKS;
    for (int k = 0; k < problem.steps; ++k, slot.advance()) {
      const u32 full = memory.full(slot.stage), to_a = memory.a(slot.stage);
      barrier_wait(memory.empty(slot.stage), slot.phase ^ 1);
      barrier_expect(full, chunks * UNIT_M * BK + WORD_BYTES + A_SCALE_BYTES + W_SCALE_BYTES);
      load_box(memory.words(slot.stage), maps.words, full, 0, tile.n0, tile.expert * problem.steps + k);
      load_box(memory.w_scale(slot.stage), maps.w_scale, full, tile.n0, k, tile.expert);
      load_box(memory.a_scale(slot.stage), maps.a_scale, full, tile.m0, k, a_expert);
      for (int i = scheduler.rank * A_BOX; i < chunks * UNIT_M; i += CLUSTER * A_BOX) {
        if constexpr (CLUSTER == 2) {
          load_box_both(to_a + i * BK, maps.a, full, k * BK, tile.m0 + i, a_expert);
        } else {
          load_box(to_a + i * BK, maps.a, full, k * BK, tile.m0 + i, a_expert);
        }
      }
    }
  }
}

// Registers of the operand of 64 rows of w and 128 of K.
using Operand = u32[4][4];

// Keeps them where they are up to this point: products read them for as long as they run, of which the compiler knows
// nothing.
__device__ __forceinline__ void pin(Operand& w) {
#pragma unroll
  for (int i = 0; i < 4; ++i) pin(w[i]);
}

// The lower half of an operand in shared memory (common.cuh), which is all that differs from one to another.
__device__ __forceinline__ u32 operand_start(u32 address) { return 1 << 16 | address >> 4; }
__device__ __forceinline__ u64 operand_from(u32 start) { return u64(0x40000040) << 32 | start; }

// Starts part = w * a over one step of K, of 64 rows of w and UNIT_M rows of a.
__device__ __forceinline__ void start(float (&part)[SUMS], Operand& w, u32 a) {
  pin(part);
  pin(w);
  wgmma_fence();
  wgmma<0>(part, w[0], operand_from(a));
#pragma unroll
  for (int i = 1; i < BK / 32; ++i) wgmma<1>(part, w[i], operand_from(a + 2 * i));
  wgmma_commit();
}

// This warp no longer reads the stage; with a cluster, whose copies fill both, both blocks want to know.
__device__ __forceinline__ void release(u32 empty) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if constexpr (CLUSTER == 2) {
    if (lane < 2) barrier_arrive_remote(empty, lane);
  } else {
    if (lane == 0) barrier_arrive(empty);
  }
}

#include "w4a8_unpack.cuh"
#include "w4a8_epilogue.cuh"

#if W4A8_UNITS
#include "w4a8_units.cuh"
#else
#include "w4a8_multiply.cuh"
#endif

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(MATH_THREADS + 128, OCCUPANCY)
    w4a8_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap words,
              const __grid_constant__ TensorMap a_scale, const __grid_constant__ TensorMap w_scale,
              const __grid_constant__ TensorMap out, const __grid_constant__ Problem problem) {
  extern __shared__ __align__(1024) u8 raw[];
  const Memory memory{shared_address(raw)};
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (threadIdx.x == MATH_THREADS) {
    prefetch_map(&a);
    prefetch_map(&words);
    prefetch_map(&a_scale);
    prefetch_map(&w_scale);
    prefetch_map(&out);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(memory.full(stage), 1);
      barrier_init(memory.empty(stage), WGS * 4 * CLUSTER);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (CLUSTER == 2) cluster_sync();
  wait_for_previous_kernel();
  admit_next_kernel();

  if (warpgroup == WGS) {
    give_registers<FEED_REGISTERS>();
    if (threadIdx.x == MATH_THREADS) feed(problem, Maps{&a, &words, &a_scale, &w_scale}, memory);
    __syncwarp();
  } else {
    take_registers<MATH_REGISTERS>();
    Multiplier(problem, &out, memory, warpgroup).run();
  }
  // A block must not leave while its neighbour still signals its barriers.
  if constexpr (CLUSTER == 2) cluster_sync();
}
