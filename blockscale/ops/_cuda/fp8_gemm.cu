// out = (a * a_scale) @ (b * b_scale)^T + bias for many rows of a, on SM90: dense and both grouped forms.
//
//   a (M, K) E4M3 row-major, a_scale (M, ceil(K/128)) column-major; b (E, N, K) E4M3, b_scale (E, ceil(N/128),
//   ceil(K/128)) row-major; out (M, N) bfloat16 or float32. Masked: a, a_scale and out have a leading E.
//   Each 128 of K accumulates in float32 in the tensor cores, then acc = fma(partial, a_scale * b_scale, acc).
//
// A persistent block computes BM x BN tiles: one thread feeds a ring of STAGES stages (128 of K each) through the
// copy engine, WGS math warpgroups take WAVES x 64 rows each, or, SIDE by side, all rows of their share of the
// columns. What keeps the tensor cores busy: the warpgroups share nothing but the ring, so one promotes while
// another multiplies, and a tile is stored by the copy engine while the next is multiplied.
// CLUSTER = 2: two blocks share the rows of a (SHARE_A) or of b, each loads half for both.
#include "config.cuh"
#include "common.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;
constexpr int BM = 64 * WAVES * (SIDE ? 1 : WGS);
constexpr int UNIT_N = BN / (SIDE ? WGS : 1);  // columns of a warpgroup
constexpr int SUMS = UNIT_N / 2;               // registers of 64 x UNIT_N
constexpr int SUPER_M = BM * (CLUSTER == 2 && !SHARE_A ? 2 : 1);  // what a cluster computes
constexpr int SUPER_N = BN * (CLUSTER == 2 && SHARE_A ? 2 : 1);
constexpr int A_BYTES = BM * BK, B_BYTES = BN * BK, SCALE_BYTES = BM * 4;
constexpr int MATH_THREADS = WGS * 128;
constexpr int OUT_SIZE = OUT_F32 ? 4 : 2;
constexpr int STAGED_WAVES = OUT_F32 ? 1 : WAVES;
constexpr int STAGED_BYTES = 64 * UNIT_N * OUT_SIZE;  // a wave of a warpgroup
static_assert(UNIT_N % 16 == 0 && BN <= 256 && WAVES <= 2, "tile shape");
static_assert(KIND == 0 || CLUSTER == 1 || SHARE_A, "rows of different experts share no rows of b");

// A warpgroup starts at column 16 * o of a row of scales, o a multiple of FIRST: it sees up to SCALE_ROWS rows,
// and 16 columns number j belong to row (o + j) / 8.
constexpr int FIRST = UNIT_N % 128 == 0 ? 8 : UNIT_N % 64 == 0 ? 4 : UNIT_N % 32 == 0 ? 2 : 1;
constexpr int SCALE_ROWS = (8 - FIRST + UNIT_N / 16 - 1) / 8 + 1;

struct Tile {
  int m0, n0;  // first row (within the expert if masked) and column
  int expert;
  int rows;    // rows from here on are not stored
};

// Hands out the tiles of this block, in an order in which tiles that run together share rows and columns.
struct Scheduler {
  const Problem& problem;
  int index, step, rank;
  int expert = 0, before = 0;  // masked: where the walk over the experts is, tiles of the experts before

  __device__ explicit Scheduler(const Problem& p)
      : problem(p), index(blockIdx.x / CLUSTER), step(gridDim.x / CLUSTER), rank(CLUSTER == 2 ? cluster_rank() : 0) {}

  __device__ __forceinline__ void place(Tile& tile, int local, int m_tiles) {
    const int per_band = GROUP * problem.n_tiles;
    const int band = local / per_band, in_band = local - band * per_band;
    const int height = min(GROUP, m_tiles - band * GROUP);
    const int n_tile = in_band / height;
    tile.m0 = (band * GROUP + in_band - n_tile * height) * SUPER_M + (SHARE_A ? 0 : rank * BM);
    tile.n0 = n_tile * SUPER_N + (SHARE_A ? rank * BN : 0);
  }

  __device__ __forceinline__ bool take(Tile& tile) {
    if constexpr (KIND == 2) {
      int m_tiles;
      while (true) {
        if (expert >= problem.experts) return false;
        tile.rows = load_int(problem.layout + expert);
        m_tiles = (tile.rows + SUPER_M - 1) / SUPER_M;
        if (index < before + m_tiles * problem.n_tiles) break;
        before += m_tiles * problem.n_tiles;
        ++expert;
      }
      place(tile, index - before, m_tiles);
      tile.expert = expert;
      index += step;
      return true;
    } else {
      while (index < problem.m_tiles * problem.n_tiles) {
        place(tile, index, problem.m_tiles);
        index += step;
        tile.rows = problem.m;
        tile.expert = KIND == 1 ? load_int(problem.layout + tile.m0) : 0;
        if (tile.expert >= 0) return true;
      }
      return false;
    }
  }
};

// Shared memory: stages of a, of b, staged waves of out, all 1024-byte aligned for the swizzle; stages of a_scale,
// barriers.
struct Memory {
  u32 base;

  __device__ __forceinline__ u32 a(int stage) const { return base + stage * A_BYTES; }
  __device__ __forceinline__ u32 b(int stage) const { return base + STAGES * A_BYTES + stage * B_BYTES; }
  __device__ __forceinline__ u32 staged() const { return base + STAGES * (A_BYTES + B_BYTES); }
  __device__ __forceinline__ u32 scale(int stage) const {
    return staged() + WGS * STAGED_WAVES * STAGED_BYTES + stage * SCALE_BYTES;
  }
  __device__ __forceinline__ u32 full(int stage) const { return scale(STAGES) + stage * 8; }
  __device__ __forceinline__ u32 empty(int stage) const { return full(stage) + STAGES * 8; }
};

__device__ __forceinline__ void feed(const Problem& problem, const TensorMap* a, const TensorMap* b,
                                     const TensorMap* a_scale, Memory memory) {
  Scheduler scheduler(problem);
  Slot slot;
  Tile tile;
  const u64 policy = KIND == 0 && problem.m_tiles == 1 ? read_once() : read_again();
  while (scheduler.take(tile)) {
    const int a_expert = KIND == 2 ? tile.expert : 0;
    for (int k = 0; k < problem.steps; ++k, slot.advance()) {
      const u32 full = memory.full(slot.stage), to_a = memory.a(slot.stage), to_b = memory.b(slot.stage);
      barrier_wait(memory.empty(slot.stage), slot.phase ^ 1);
      barrier_expect(full, A_BYTES + B_BYTES + SCALE_BYTES);
      load_box(memory.scale(slot.stage), a_scale, full, tile.m0, k, a_expert);
      if constexpr (CLUSTER == 2 && SHARE_A) {
        const int half = scheduler.rank * (BM / 2);
        load_box_both(to_a + half * BK, a, full, k * BK, tile.m0 + half, a_expert);
      } else {
        load_box(to_a, a, full, k * BK, tile.m0, a_expert);
      }
      if constexpr (CLUSTER == 2 && !SHARE_A) {
        const int half = scheduler.rank * (BN / 2);
        load_box_both(to_b + half * BK, b, full, k * BK, tile.n0 + half, tile.expert);
      } else {
        load_box_policy(to_b, b, full, k * BK, tile.n0, tile.expert, policy);
      }
    }
  }
}

// The rows of weight scales that a warpgroup sees in a tile: step 0 of the first, and how many there are after it.
struct ScaleRows {
  const float* first;
  int more;
};

__device__ __forceinline__ ScaleRows scale_rows(const Problem& problem, const Tile& tile, int first_column) {
  const int row = min((tile.n0 + first_column) / 128, problem.scale_rows - 1);
  const i64 at = (i64(tile.expert) * problem.scale_rows + row) * problem.steps;
  return {problem.b_scale + at, problem.scale_rows - 1 - row};
}

__device__ __forceinline__ void load_b_scale(float (&scale)[SCALE_ROWS], const float* first, int more, int steps) {
#pragma unroll
  for (int r = 0; r < SCALE_ROWS; ++r) scale[r] = __ldg(first + min(r, more) * steps);
}

// scale[w][h][r]: of wave w, its upper and lower eight rows, times row r of the weight scales of this step.
__device__ __forceinline__ void load_scales(float (&scale)[WAVES][2][SCALE_ROWS], u32 a_scales,
                                            const float (&b_scale)[SCALE_ROWS]) {
#pragma unroll
  for (int w = 0; w < WAVES; ++w) {
    const float upper = load_shared(a_scales + w * 64 * 4), lower = load_shared(a_scales + (w * 64 + 8) * 4);
#pragma unroll
    for (int r = 0; r < SCALE_ROWS; ++r) {
      scale[w][0][r] = upper * b_scale[r];
      scale[w][1][r] = lower * b_scale[r];
    }
  }
}

// Starts part = a * b over one step of K.
__device__ __forceinline__ void start(float (&part)[SUMS], u32 a, u32 b) {
  const u64 a_operand = operand(a), b_operand = operand(b);
  pin(part);
  wgmma_fence();
  wgmma<0>(part, a_operand, b_operand);
#pragma unroll
  for (int i = 1; i < BK / 32; ++i) wgmma<1>(part, a_operand + 2 * i, b_operand + 2 * i);
  wgmma_commit();
  pin(part);
}

// acc += part * scale; scale[h][r]: of the upper and lower eight rows, for the rows r of weight scales.
__device__ __forceinline__ void promote(float (&acc)[SUMS], const float (&part)[SUMS],
                                        const float (&scale)[2][SCALE_ROWS], int boundary) {
#pragma unroll
  for (int i = 0; i < SUMS / 4; ++i) {
    const int j = i / 2, r = j / 8;
    float upper = scale[0][r], lower = scale[1][r];
    if (j % 8 >= FIRST && r + 1 < SCALE_ROWS) {
      const bool next = j % 8 >= boundary;
      upper = next ? scale[0][r + 1] : upper;
      lower = next ? scale[1][r + 1] : lower;
    }
    acc[4 * i] = fmaf(part[4 * i], upper, acc[4 * i]);
    acc[4 * i + 1] = fmaf(part[4 * i + 1], upper, acc[4 * i + 1]);
    acc[4 * i + 2] = fmaf(part[4 * i + 2], lower, acc[4 * i + 2]);
    acc[4 * i + 3] = fmaf(part[4 * i + 3], lower, acc[4 * i + 3]);
  }
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

#include "epilogue.cuh"

__device__ __forceinline__ void multiply(const Problem& problem, const TensorMap* out, Memory memory, int warpgroup) {
  const int lane = threadIdx.x % 32;
  const int first_row = SIDE ? 0 : warpgroup * WAVES * 64, first_column = SIDE ? warpgroup * UNIT_N : 0;
  const u32 my_row = (first_row + threadIdx.x % 128 / 32 * 16 + lane / 4) * 4;
  Scheduler scheduler(problem);
  Tile tile, next;
  if (!scheduler.take(tile)) return;
  Slot slot;
  float acc[WAVES][SUMS], part[SUMS], b_scale[SCALE_ROWS], b_next[SCALE_ROWS];
  bool ready = false;
  ScaleRows rows = scale_rows(problem, tile, first_column);
  load_b_scale(b_scale, rows.first, rows.more, problem.steps);

  while (true) {
    const bool another = scheduler.take(next);
    const ScaleRows next_rows = another ? scale_rows(problem, next, first_column) : rows;
    const int n0 = tile.n0 + first_column, boundary = 8 - n0 % 128 / 16;
#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) acc[w][i] = 0.0f;
    }
    for (int k = 0; k < problem.steps; ++k) {
      const int stage = slot.stage;
      if (!ready) barrier_wait(memory.full(stage), slot.phase);
      slot.advance();
      float scale[WAVES][2][SCALE_ROWS];
#pragma unroll
      for (int w = 0; w < WAVES; ++w) {
        start(part, memory.a(stage) + (first_row + w * 64) * BK, memory.b(stage) + first_column * BK);
        // What can be done while the tensor cores work, so that little but promotions keeps them waiting.
        if (w == 0) {
          load_scales(scale, memory.scale(stage) + my_row, b_scale);
          const bool same = k + 1 < problem.steps;
          const float* const from = same ? rows.first + k + 1 : next_rows.first;
          load_b_scale(b_next, from, same ? rows.more : next_rows.more, problem.steps);
        }
        if (w + 1 == WAVES) {
          const bool more = another || k + 1 < problem.steps;
          ready = more && barrier_test(memory.full(slot.stage), slot.phase);
        }
        wgmma_wait<0>();
        pin(part);
        if (w + 1 == WAVES) release(memory.empty(stage));
        promote(acc[w], part, scale[w], boundary);
      }
#pragma unroll
      for (int r = 0; r < SCALE_ROWS; ++r) b_scale[r] = b_next[r];
    }
    store_tile(problem, out, tile, acc, memory, warpgroup, first_row, n0);
    if (!another) break;
    tile = next;
    rows = next_rows;
  }
  if (threadIdx.x % 128 == 0) store_wait();
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(MATH_THREADS + 128, OCCUPANCY)
    fp8_gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
             const __grid_constant__ TensorMap a_scale, const __grid_constant__ TensorMap out,
             const __grid_constant__ Problem problem) {
  extern __shared__ __align__(1024) u8 raw[];
  const Memory memory{shared_address(raw)};
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (threadIdx.x == MATH_THREADS) {
    prefetch_map(&a);
    prefetch_map(&b);
    prefetch_map(&a_scale);
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
    if (threadIdx.x == MATH_THREADS) feed(problem, &a, &b, &a_scale, memory);
    __syncwarp();
  } else {
    take_registers<MATH_REGISTERS>();
    multiply(problem, &out, memory, warpgroup);
  }
  // A block must not leave while its neighbour still signals its barriers.
  if constexpr (CLUSTER == 2) cluster_sync();
}
