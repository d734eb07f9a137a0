// out = (a * a_scale) @ (b * b_scale)^T + bias for few rows of a, on SM90: dense and masked.
//
// Layouts as in fp8_gemm.cu. With few rows the time is that of reading b once, so what counts is bytes in flight.
// The operands change roles: b gives the 64 rows of the tensor core instruction, a its BT = 8 to 128 columns, so
// little of the tile is padding. A tile is BN rows of b by BT rows of a; blocks are small, so that two fit on a
// multiprocessor and one streams while the other stores. Where that leaves too few tiles, a cluster of SPLITS
// blocks divides K and adds up its partial tiles through distributed shared memory, always in the same order.
#include "config.cuh"
#include "common.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;
constexpr int BN = 64 * WGS * WAVES;
constexpr int SUMS = BT / 2;  // registers of 64 x BT
constexpr int MATH_THREADS = WGS * 128;
constexpr int A_BYTES = BT * BK, B_BYTES = BN * BK, SCALE_BYTES = BT * 4 < 128 ? 128 : BT * 4;
constexpr int LINE = BN + 4;  // floats of a row of the staged tile; the 4 keep its writes free of bank conflicts
static_assert(BT % 8 == 0 && BT % SPLITS == 0 && WAVES <= 2, "tile shape");

struct Tile {
  int m0, n0, expert, rows;
};

// Of masked rows: an expert's, and how many tiles there are up to and with its own. Blocks look for a tile's
// expert here, for walking through all counts in memory took as long as the products of a few rows.
struct Ranges {
  int rows[MOST_EXPERTS], ends[MOST_EXPERTS];
};

__device__ __forceinline__ int tiles_down(int rows) { return (rows + BT - 1) / BT; }

// Called by all threads; the next barrier of the block publishes the result.
__device__ __forceinline__ void find_ranges(const Problem& problem, Ranges& ranges) {
  for (int e = threadIdx.x; e < problem.experts; e += MATH_THREADS + 32) ranges.rows[e] = load_int(problem.layout + e);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  int before = 0;
  for (int first = 0; first < problem.experts; first += 32) {
    const int e = first + threadIdx.x;
    int tiles = e < problem.experts ? tiles_down(ranges.rows[e]) * problem.n_tiles : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int others = __shfl_up_sync(0xffffffff, tiles, step);
      if (threadIdx.x >= step) tiles += others;
    }
    if (e < problem.experts) ranges.ends[e] = before + tiles;
    before += __shfl_sync(0xffffffff, tiles, 31);
  }
}

struct Scheduler {
  const Problem& problem;
  const Ranges& ranges;
  int index, step;
  int expert = 0;

  __device__ Scheduler(const Problem& p, const Ranges& r)
      : problem(p), ranges(r), index(blockIdx.x / SPLITS), step(gridDim.x / SPLITS) {}

  // Tiles that share rows of b follow one another: those rows come from memory once.
  __device__ __forceinline__ bool take(Tile& tile) {
    int m_tiles = problem.m_tiles, local = index;
    tile.rows = problem.m;
    if constexpr (KIND == 2) {
      int last = problem.experts - 1;
      if (index >= ranges.ends[last]) return false;
      while (expert < last) {  // to the first expert that ends past index
        const int middle = (expert + last) / 2;
        if (ranges.ends[middle] > index) {
          last = middle;
        } else {
          expert = middle + 1;
        }
      }
      tile.rows = ranges.rows[expert];
      m_tiles = tiles_down(tile.rows);
      if (expert > 0) local -= ranges.ends[expert - 1];
    } else if (index >= m_tiles * problem.n_tiles) {
      return false;
    }
    const int n_tile = local / m_tiles;
    tile.m0 = (local - n_tile * m_tiles) * BT;
    tile.n0 = n_tile * BN;
    tile.expert = expert;
    index += step;
    return true;
  }
};

struct Memory {
  u32 base;

  __device__ __forceinline__ u32 b(int stage) const { return base + stage * B_BYTES; }
  __device__ __forceinline__ u32 a(int stage) const { return base + STAGES * B_BYTES + stage * A_BYTES; }
  __device__ __forceinline__ u32 scale(int stage) const {
    return base + STAGES * (A_BYTES + B_BYTES) + stage * SCALE_BYTES;
  }
  __device__ __forceinline__ u32 staged() const { return base + STAGES * (A_BYTES + B_BYTES + SCALE_BYTES); }
  __device__ __forceinline__ u32 full(int stage) const { return staged() + BT * LINE * 4 + stage * 8; }
  __device__ __forceinline__ u32 empty(int stage) const { return full(stage) + STAGES * 8; }
  __device__ __forceinline__ u32 written() const { return full(0) + STAGES * 16; }
  __device__ __forceinline__ u32 read() const { return written() + 8; }
};
constexpr int RANGES_AT = STAGES * (A_BYTES + B_BYTES + SCALE_BYTES + 16) + BT * LINE * 4 + 16;

// Steps of K that block `rank` of a cluster takes.
__device__ __forceinline__ int first_step(const Problem& problem, int rank) { return problem.steps * rank / SPLITS; }

__device__ __forceinline__ void feed(const Problem& problem, const TensorMap* a, const TensorMap* b,
                                     const TensorMap* a_scale, const Ranges& ranges, Memory memory, int rank) {
  Scheduler scheduler(problem, ranges);
  Slot slot;
  Tile tile;
  const int first = first_step(problem, rank), last = first_step(problem, rank + 1);
  // Products of many experts measured 7 % slower with the mark.
  const u64 policy = KIND == 2 ? read_again() : read_once();
  while (scheduler.take(tile)) {
    for (int k = first; k < last; ++k, slot.advance()) {
      const u32 full = memory.full(slot.stage);
      barrier_wait(memory.empty(slot.stage), slot.phase ^ 1);
      barrier_expect(full, A_BYTES + B_BYTES + BT * 4);
      load_box_policy(memory.b(slot.stage), b, full, k * BK, tile.n0, tile.expert, policy);
      load_box(memory.a(slot.stage), a, full, k * BK, tile.m0, tile.expert);
      load_box(memory.scale(slot.stage), a_scale, full, tile.m0, k, tile.expert);
    }
  }
}

// One lane holds the weight scale of one step, 32 steps in all.
__device__ __forceinline__ float load_b_scale(const Problem& problem, const Tile& tile, int first_row, int k, int last) {
  const int row = min((tile.n0 + first_row) / 128, problem.scale_rows - 1);
  k += threadIdx.x % 32;
  const i64 at = (i64(tile.expert) * problem.scale_rows + row) * problem.steps + k;
  return k < last ? __ldg(problem.b_scale + at) : 0.0f;
}

// Adds up the staged tiles of the cluster and stores this block's share of the rows of out.
__device__ __forceinline__ void store_tile(const Problem& problem, const Tile& tile, Memory memory, int rank) {
  constexpr int SIZE = OUT_F32 ? 4 : 2;
  u8* const out = static_cast<u8*>(problem.out) + tile.expert * problem.out_expert * SIZE;
  for (int i = threadIdx.x; i < BT / SPLITS * (BN / 4); i += MATH_THREADS) {
    const int token = rank * (BT / SPLITS) + i / (BN / 4), column = i % (BN / 4) * 4;
    const u32 at = memory.staged() + (token * LINE + column) * 4;
    float4 sum = load_staged(at, 0, SPLITS > 1);
#pragma unroll
    for (int s = 1; s < SPLITS; ++s) {
      const float4 more = load_staged(at, s, true);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    const int row = tile.m0 + token, n = tile.n0 + column;
    if (row >= tile.rows || n >= problem.n) continue;
    if constexpr (BIAS != 0) {
      sum.x += bias_at(problem.bias, n), sum.y += bias_at(problem.bias, n + 1);
      sum.z += bias_at(problem.bias, n + 2), sum.w += bias_at(problem.bias, n + 3);
    }
    u8* const to = out + (row * problem.out_row + n) * SIZE;
    if constexpr (OUT_F32) {
      store16(to, __float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z), __float_as_uint(sum.w));
    } else {
      store8(to, pack(sum.x, sum.y), pack(sum.z, sum.w));
    }
  }
}

// Every math thread of the cluster (of the block, without splits) is here.
__device__ __forceinline__ void meet(u32 barrier, u32 parity) {
  if constexpr (SPLITS == 1) {
    named_sync(1, MATH_THREADS);
  } else {
    __syncwarp();
    if (threadIdx.x % 32 < SPLITS) barrier_publish(barrier, threadIdx.x % 32);
    barrier_wait_cluster(barrier, parity);
  }
}

__device__ __forceinline__ void multiply(const Problem& problem, const Ranges& ranges, Memory memory, int warpgroup,
                                         int rank) {
  const int lane = threadIdx.x % 32, first_row = warpgroup * WAVES * 64;
  const int my_row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4, my_column = lane % 4 * 2;
  const int first = first_step(problem, rank), last = first_step(problem, rank + 1);
  Scheduler scheduler(problem, ranges);
  Tile tile, next;
  if (!scheduler.take(tile)) return;
  Slot slot;
  u32 parity = 0;
  float acc[WAVES][SUMS], part[WAVES][SUMS];
  float b_ahead = load_b_scale(problem, tile, first_row, first, last), b_scales = 0.0f;

  while (true) {
    const bool another = scheduler.take(next);
#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) acc[w][i] = 0.0f;
    }
    for (int k = first; k < last; ++k, slot.advance()) {
      if ((k - first) % 32 == 0) {
        b_scales = b_ahead;
        if (k + 32 < last) {
          b_ahead = load_b_scale(problem, tile, first_row, k + 32, last);
        } else if (another) {
          b_ahead = load_b_scale(problem, next, first_row, first, last);
        }
      }
      barrier_wait(memory.full(slot.stage), slot.phase);
      const u64 tokens = operand(memory.a(slot.stage));
#pragma unroll
      for (int w = 0; w < WAVES; ++w) pin(part[w]);
      wgmma_fence();
#pragma unroll
      for (int w = 0; w < WAVES; ++w) {
        const u64 weights = operand(memory.b(slot.stage) + (first_row + w * 64) * BK);
        wgmma<0>(part[w], weights, tokens);
#pragma unroll
        for (int i = 1; i < BK / 32; ++i) wgmma<1>(part[w], weights + 2 * i, tokens + 2 * i);
      }
      wgmma_commit();
      const float b_scale = __shfl_sync(0xffffffff, b_scales, (k - first) % 32);
#pragma unroll
      for (int w = 0; w < WAVES; ++w) pin(part[w]);
      wgmma_wait<0>();
#pragma unroll
      for (int w = 0; w < WAVES; ++w) pin(part[w]);
#pragma unroll
      for (int i = 0; i < BT / 8; ++i) {
        const float2 a = load_shared2(memory.scale(slot.stage) + (8 * i + my_column) * 4);
        const float left = a.x * b_scale, right = a.y * b_scale;
#pragma unroll
        for (int w = 0; w < WAVES; ++w) {
          acc[w][4 * i] = fmaf(part[w][4 * i], left, acc[w][4 * i]);
          acc[w][4 * i + 1] = fmaf(part[w][4 * i + 1], right, acc[w][4 * i + 1]);
          acc[w][4 * i + 2] = fmaf(part[w][4 * i + 2], left, acc[w][4 * i + 2]);
          acc[w][4 * i + 3] = fmaf(part[w][4 * i + 3], right, acc[w][4 * i + 3]);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(memory.empty(slot.stage));
    }

#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) {
        const int column = i / 4 * 8 + my_column + i % 2, row = my_row + w * 64 + i / 2 % 2 * 8;
        store_shared(memory.staged() + (column * LINE + row) * 4, acc[w][i]);
      }
    }
    meet(memory.written(), parity);
    store_tile(problem, tile, memory, rank);
    if (!another) return;
    meet(memory.read(), parity);
    parity ^= 1;
    tile = next;
  }
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(MATH_THREADS + 32, OCCUPANCY)
    fp8_gemm_few(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                 const __grid_constant__ TensorMap a_scale, const __grid_constant__ Problem problem) {
  extern __shared__ __align__(1024) u8 raw[];
  const Memory memory{shared_address(raw)};
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  const int rank = SPLITS > 1 ? cluster_rank() : 0;
  if (threadIdx.x == MATH_THREADS) {
    prefetch_map(&a);
    prefetch_map(&b);
    prefetch_map(&a_scale);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(memory.full(stage), 1);
      barrier_init(memory.empty(stage), WGS * 4);
    }
    barrier_init(memory.written(), WGS * 4 * SPLITS);
    barrier_init(memory.read(), WGS * 4 * SPLITS);
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (SPLITS > 1) cluster_sync();
  wait_for_previous_kernel();
  admit_next_kernel();
  Ranges& ranges = *reinterpret_cast<Ranges*>(raw + RANGES_AT);
  if constexpr (KIND == 2) {
    find_ranges(problem, ranges);
    __syncthreads();
  }

  if (warpgroup == WGS) {
    if (threadIdx.x == MATH_THREADS) feed(problem, &a, &b, &a_scale, ranges, memory, rank);
    __syncwarp();
  } else {
    multiply(problem, ranges, memory, warpgroup, rank);
  }
  // A block must not leave while others of its cluster read its shared memory or signal its barriers.
  if constexpr (SPLITS > 1) cluster_sync();
}
