// out = (a * a_scale) @ (b * b_scale)^T + bias for many rows of a, on SM90: dense and both grouped forms.
//
//   a (M, K) E4M3 row-major, a_scale (M, ceil(K/128)) column-major; b (E, N, K) E4M3, b_scale (E, ceil(N/128),
//   ceil(K/128)) row-major; out (M, N) bfloat16 or float32. Masked: a, a_scale and out have a leading E.
//   Each 128 of K accumulates in float32 in the tensor cores, then acc = fma(partial, a_scale * b_scale, acc).
//
// A persistent block computes BM x BN tiles: one warp feeds a ring of STAGES stages (128 of K each) through the
// copy engine, another brings their weight scales, WGS math warpgroups take WAVES x 64 rows each, or, SIDE by side,
// all rows of their share of the columns. What keeps the tensor cores busy: the warpgroups share nothing but the
// ring, so one promotes while another multiplies; a tile leaves through the copy engine, and is handed to it while
// the first products of the next one run.
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

// Columns that start at a multiple of 16 * aligned see up to this many rows of weight scales.
constexpr int alignment(int columns) {
  return columns % 128 == 0 ? 8 : columns % 64 == 0 ? 4 : columns % 32 == 0 ? 2 : 1;
}
constexpr int rows_seen(int columns) { return (8 - alignment(columns) + columns / 16 - 1) / 8 + 1; }
constexpr int ALIGNED = alignment(UNIT_N), SCALE_ROWS = rows_seen(UNIT_N), TILE_SCALE_ROWS = rows_seen(BN);
constexpr int B_SCALE_BYTES = 16;
static_assert(TILE_SCALE_ROWS * 4 <= B_SCALE_BYTES, "room for the weight scales of a stage");

// Rows of an expert, when masked.
__device__ __forceinline__ int rows_of(const Problem& problem, int expert) {
  return load_int(problem.layout + expert);
}

#include "schedule.cuh"

// Shared memory: stages of a, of b, staged waves of out, all 1024-byte aligned for the swizzle; stages of a_scale,
// of b_scale; barriers.
struct Memory {
  u32 base;

  __device__ __forceinline__ u32 a(int stage) const { return base + stage * A_BYTES; }
  __device__ __forceinline__ u32 b(int stage) const { return base + STAGES * A_BYTES + stage * B_BYTES; }
  __device__ __forceinline__ u32 staged() const { return base + STAGES * (A_BYTES + B_BYTES); }
  __device__ __forceinline__ u32 scale(int stage) const {
    return staged() + WGS * STAGED_WAVES * STAGED_BYTES + stage * SCALE_BYTES;
  }
  __device__ __forceinline__ u32 b_scale(int stage) const { return scale(STAGES) + stage * B_SCALE_BYTES; }
  __device__ __forceinline__ u32 full(int stage) const { return b_scale(STAGES) + stage * 8; }
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

// One lane holds the weight scales of one step of a tile, from step k on.
__device__ __forceinline__ void load_b_scales(float (&scales)[TILE_SCALE_ROWS], const Problem& problem,
                                              const Tile& tile, int k) {
  k = min(k + int(threadIdx.x % 32), problem.steps - 1);
#pragma unroll
  for (int r = 0; r < TILE_SCALE_ROWS; ++r) {
    const int row = min(tile.n0 / 128 + r, problem.scale_rows - 1);
    scales[r] = __ldg(problem.b_scale + (i64(tile.expert) * problem.scale_rows + row) * problem.steps + k);
  }
}

// Brings the weight scales of every stage. A warp of its own: only it waits for the memory they are loaded from.
__device__ __forceinline__ void feed_b_scales(const Problem& problem, Memory memory) {
  const int lane = threadIdx.x % 32;
  Scheduler scheduler(problem);
  Slot slot;
  Tile tile, next;
  if (!scheduler.take(tile)) return;
  float ahead[TILE_SCALE_ROWS], scales[TILE_SCALE_ROWS];
  load_b_scales(ahead, problem, tile, 0);
  while (true) {
    const bool another = scheduler.take(next);
    for (int k = 0; k < problem.steps; ++k, slot.advance()) {
      if (k % 32 == 0) {
#pragma unroll
        for (int r = 0; r < TILE_SCALE_ROWS; ++r) scales[r] = ahead[r];
        if (k + 32 < problem.steps) {
          load_b_scales(ahead, problem, tile, k + 32);
        } else if (another) {
          load_b_scales(ahead, problem, next, 0);
        }
      }
      barrier_wait(memory.empty(slot.stage), slot.phase ^ 1);
      if (lane == k % 32) {
#pragma unroll
        for (int r = 0; r < TILE_SCALE_ROWS; ++r) store_shared(memory.b_scale(slot.stage) + r * 4, scales[r]);
        barrier_arrive(memory.full(slot.stage));
      }
      __syncwarp();
    }
    if (!another) return;
    tile = next;
  }
}

// What a thread needs of the scales of a stage: of its upper and lower row of each wave, and of the columns.
struct Scales {
  float a[WAVES][2], b[SCALE_ROWS];
};

// Starts part = a * b over one step of K.
__device__ __forceinline__ void start(float (&part)[SUMS], u64 a, u64 b) {
  pin(part);
  wgmma_fence();
  wgmma<0>(part, a, b);
#pragma unroll
  for (int i = 1; i < BK / 32; ++i) wgmma<1>(part, a + 2 * i, b + 2 * i);
  wgmma_commit();
}

// acc += part * a * b, or the product alone for the FIRST step; a: scales of the upper and lower eight rows. 16
// columns number j have the first scale of b if j < boundary.
template <bool FIRST>
__device__ __forceinline__ void promote(float (&acc)[SUMS], const float (&part)[SUMS], const float (&a)[2],
                                        const float (&b)[SCALE_ROWS], int boundary) {
  float scale[2][SCALE_ROWS];
#pragma unroll
  for (int r = 0; r < SCALE_ROWS; ++r) {
    scale[0][r] = a[0] * b[r];
    scale[1][r] = a[1] * b[r];
  }
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    const int j = i / 8, r = j / 8, half = i / 2 % 2;
    float s = scale[half][r];
    if (j % 8 >= ALIGNED && r + 1 < SCALE_ROWS) s = j % 8 >= boundary ? scale[half][r + 1] : s;
    acc[i] = FIRST ? part[i] * s : fmaf(part[i], s, acc[i]);
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

// What a warpgroup does with the stages of all its tiles.
struct Multiplier {
  const Problem& problem;
  const TensorMap* out;
  const Memory memory;
  const int warpgroup, first_row, first_column;
  const u32 my_row;  // bytes from the first scale of a stage to this thread's
  Slot slot;
  u64 a, b;            // operands in the stage of slot
  bool ready = false;  // it is known to be full
  int boundary;        // of this tile, see promote
  u32 first_scale;     // of this tile, bytes from the first weight scale of a stage to the warpgroup's

  __device__ __forceinline__ Multiplier(const Problem& problem, const TensorMap* out, Memory memory, int warpgroup)
      : problem(problem),
        out(out),
        memory(memory),
        warpgroup(warpgroup),
        first_row(SIDE ? 0 : warpgroup * WAVES * 64),
        first_column(SIDE ? warpgroup * UNIT_N : 0),
        my_row((first_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) * 4) {}

  __device__ __forceinline__ void load(Scales& scales, int stage) const {
    const u32 from_a = memory.scale(stage) + my_row, from_b = memory.b_scale(stage) + first_scale;
#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
      scales.a[w][0] = load_shared(from_a + w * 64 * 4);
      scales.a[w][1] = load_shared(from_a + (w * 64 + 8) * 4);
    }
#pragma unroll
    for (int r = 0; r < SCALE_ROWS; ++r) scales.b[r] = load_shared(from_b + r * 4);
  }

  // The stage that is multiplied next.
  __device__ __forceinline__ void aim() {
    a = operand(memory.a(slot.stage) + first_row * BK);
    b = operand(memory.b(slot.stage) + first_column * BK);
  }

  // acc += the products of a stage, or acc = for the FIRST of a tile. What can be done while the tensor cores work is
  // done then, meanwhile() as well, so that little but promotions keeps them waiting.
  template <bool FIRST, class Function>
  __device__ __forceinline__ void step(float (&acc)[WAVES][SUMS], Function&& meanwhile) {
    float part[SUMS];
    Scales scales;
    const int stage = slot.stage;
    const u64 my_a = a, my_b = b;
    if (!ready) barrier_wait(memory.full(stage), slot.phase);
#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
      start(part, my_a + w * (64 * BK >> 4), my_b);
      if (w == 0) {
        __syncwarp();  // to the compiler, the end of what it may mix with starting the products
        meanwhile();
        load(scales, stage);
        slot.advance();
        aim();
      }
      if (w + 1 == WAVES) ready = barrier_test(memory.full(slot.stage), slot.phase);
      wgmma_wait<0>();
      pin(part);
      if (w + 1 == WAVES) release(memory.empty(stage));
      promote<FIRST>(acc[w], part, scales.a[w], scales.b, boundary);
    }
  }

  __device__ __forceinline__ void store(const Tile& tile, const float (&acc)[WAVES][SUMS]) const {
    store_tile(problem, out, tile, acc, memory, warpgroup, first_row, tile.n0 + first_column);
  }

  __device__ __forceinline__ void run() {
    Scheduler scheduler(problem);
    Tile tile, done;
    float acc[WAVES][SUMS];
    bool more = scheduler.take(tile), pending = false;
    aim();
    while (more) {
      const int n0 = tile.n0 + first_column;
      boundary = 8 - n0 % 128 / 16;
      first_scale = (n0 / 128 - tile.n0 / 128) * 4;
      step<true>(acc, [&] {
        if (pending) store(done, acc);
        done = tile;
        pending = true;
        more = scheduler.take(tile);
      });
      for (int k = 1; k < problem.steps; ++k) step<false>(acc, [] {});
    }
    if (pending) store(done, acc);
    if (threadIdx.x % 128 == 0) store_wait();
  }
};

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
      barrier_init(memory.full(stage), 2);
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
    if (threadIdx.x / 32 == MATH_THREADS / 32 + 1) feed_b_scales(problem, memory);
    __syncwarp();
  } else {
    take_registers<MATH_REGISTERS>();
    Multiplier(problem, &out, memory, warpgroup).run();
  }
  // A block must not leave while its neighbour still signals its barriers.
  if constexpr (CLUSTER == 2) cluster_sync();
}
