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
// The rows of a are multiplied in two halves: a scale of theirs that is loaded serves all waves, and a half of which no
// row counts is left out. Warpgroups share nothing but the ring, so one promotes while another multiplies.
// CLUSTER = 2: two blocks share the rows of a, each loads half for both.
#include "config.cuh"
#include "common.cuh"
#include "wgmma.cuh"

constexpr int BK = 128;
constexpr int UNIT_M = BM / 2;      // rows of a in one product
constexpr int SUMS = UNIT_M / 2;    // registers of 64 x UNIT_M
constexpr int UNIT_N = 64 * WAVES;  // rows of w of a warpgroup
constexpr int BN = UNIT_N * WGS;
constexpr bool SHARE_A = true;
constexpr int SUPER_M = BM, SUPER_N = BN * CLUSTER;  // what a cluster computes
constexpr int LINE = 64;                             // bytes of a row of words
constexpr int A_BYTES = BM * BK, WORD_BYTES = BN * LINE, A_SCALE_BYTES = BM * 4, W_SCALE_BYTES = BN * 4;
constexpr int MATH_THREADS = WGS * 128;
constexpr int OUT_SIZE = OUT_F32 ? 4 : 2;
constexpr int STAGED_WAVES = OUT_F32 ? 1 : WAVES;
constexpr int STAGED_BYTES = 64 * BM * OUT_SIZE;  // a wave of a warpgroup
static_assert(BM % 32 == 0 && BM <= 128 && WAVES <= 2, "tile shape");

// Rows of an expert, when masked: counts past the end of its rows mean all of them.
__device__ __forceinline__ int rows_of(const Problem& problem, int expert) {
  return min(load_int(problem.layout + expert), problem.m);
}

#include "schedule.cuh"

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
    const int a_expert = KIND == 2 ? tile.expert : 0;
    for (int k = 0; k < problem.steps; ++k, slot.advance()) {
      const u32 full = memory.full(slot.stage), to_a = memory.a(slot.stage);
      barrier_wait(memory.empty(slot.stage), slot.phase ^ 1);
      barrier_expect(full, A_BYTES + WORD_BYTES + A_SCALE_BYTES + W_SCALE_BYTES);
      load_box(memory.words(slot.stage), maps.words, full, 0, tile.n0, tile.expert * problem.steps + k);
      load_box(memory.w_scale(slot.stage), maps.w_scale, full, tile.n0, k, tile.expert);
      load_box(memory.a_scale(slot.stage), maps.a_scale, full, tile.m0, k, a_expert);
      if constexpr (CLUSTER == 2) {
        const int half = scheduler.rank * UNIT_M;
        load_box_both(to_a + half * BK, maps.a, full, k * BK, tile.m0 + half, a_expert);
      } else {
        load_box(to_a, maps.a, full, k * BK, tile.m0, a_expert);
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

// Starts part = w * a over one step of K, of 64 rows of w and UNIT_M rows of a.
__device__ __forceinline__ void start(float (&part)[SUMS], Operand& w, u64 a) {
  pin(part);
  pin(w);
  wgmma_fence();
  wgmma<0>(part, w[0], a);
#pragma unroll
  for (int i = 1; i < BK / 32; ++i) wgmma<1>(part, w[i], a + 2 * i);
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

// What a warpgroup does with the stages of all its tiles.
struct Multiplier {
  const Problem& problem;
  const TensorMap* out;
  const Memory memory;
  const int warpgroup;
  const u32 my_words, my_w_scale, my_a_scale;  // bytes from the first of a stage to this thread's
  Slot slot;

  __device__ __forceinline__ Multiplier(const Problem& problem, const TensorMap* out, Memory memory, int warpgroup)
      : problem(problem),
        out(out),
        memory(memory),
        warpgroup(warpgroup),
        my_words(warpgroup * UNIT_N * LINE + words_of_lane()),
        my_w_scale((warpgroup * UNIT_N + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) * 4),
        my_a_scale(threadIdx.x % 4 * 8) {}

  // The operand of a wave of the stage of slot.
  __device__ __forceinline__ void make(Operand& w, int wave) const {
    const u32 words = memory.words(slot.stage) + my_words + wave * 64 * LINE;
    unpack(w, words, memory.w_scale(slot.stage) + my_w_scale + wave * 64 * 4);
  }

  // Waits for the stage of slot and makes the operand of its first wave.
  __device__ __forceinline__ void begin(Operand& w) const {
    barrier_wait(memory.full(slot.stage), slot.phase);
    make(w, 0);
  }

  // acc += part * w_scale * a_scale for one half of the rows of a.
  __device__ __forceinline__ void promote(float (&acc)[WAVES][2][SUMS], const float (&part)[WAVES][SUMS], int stage,
                                          int half) const {
    const u32 from_w = memory.w_scale(stage) + my_w_scale, from_a = memory.a_scale(stage) + my_a_scale;
    float rows[WAVES][2];
#pragma unroll
    for (int i = 0; i < WAVES * 2; ++i) {
      rows[i / 2][i % 2] = scale_value(load_shared(from_w + (i / 2 * 64 + i % 2 * 8) * 4));
    }
#pragma unroll
    for (int j = 0; j < UNIT_M / 8; ++j) {
      const float2 scale = load_shared2(from_a + (half * UNIT_M + j * 8) * 4);
#pragma unroll
      for (int wave = 0; wave < WAVES; ++wave) {
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          float& sum = acc[wave][half][i];
          sum = fmaf(part[wave][i] * rows[wave][i / 2 % 2], i % 2 ? scale.y : scale.x, sum);
        }
      }
    }
  }

  // Whether any of the second half of a tile's rows counts.
  __device__ __forceinline__ bool needs_both(const Tile& tile) const {
    const int second = tile.m0 + UNIT_M;
    return KIND == 1 ? load_int(problem.layout + second) >= 0 : second < tile.rows;
  }

  // Adds the products of a stage to acc; w[0] has been made, and is made for the next stage. meanwhile() is called
  // while the tensor cores work, before acc is used; it tells whether there is a next stage.
  template <class Function>
  __device__ __forceinline__ void step(float (&acc)[WAVES][2][SUMS], Operand (&w)[WAVES], const bool& both,
                                       Function&& meanwhile) {
    const int stage = slot.stage;
    const u64 a = operand(memory.a(stage));
    float part[WAVES][SUMS];
    start(part[0], w[0], a);
    if constexpr (WAVES == 2) {
      make(w[1], 1);
      start(part[1], w[1], a);
    }
    const bool another = meanwhile();
    finish(part, w);
    promote(acc, part, stage, 0);

    slot.advance();
    if (both) {
#pragma unroll
      for (int wave = 0; wave < WAVES; ++wave) start(part[wave], w[wave], a + (UNIT_M * BK >> 4));
      wgmma_wait<WAVES - 1>();
      pin(w[0]);
      if (another) begin(w[0]);
      finish(part, w);
      promote(acc, part, stage, 1);
    } else if (another) {
      begin(w[0]);
    }
    release(memory.empty(stage));
  }

  // Waits for the products of all waves.
  static __device__ __forceinline__ void finish(float (&part)[WAVES][SUMS], Operand (&w)[WAVES]) {
    wgmma_wait<0>();
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave) {
      pin(part[wave]);
      pin(w[wave]);
    }
  }

  __device__ __forceinline__ void run() {
    Scheduler scheduler(problem);
    Tile tile, done;
    float acc[WAVES][2][SUMS];
    Operand w[WAVES];
    const int last = problem.steps - 1;
    bool more = scheduler.take(tile), pending = false, both = true;
    if (more) begin(w[0]);
    while (more) {
      step(acc, w, both, [&] {
        if (pending) store_tile(problem, out, done, acc, memory, warpgroup);
        clear(acc);
        done = tile;
        both = needs_both(tile);
        pending = true;
        more = scheduler.take(tile);
        return last > 0 || more;
      });
      for (int k = 1; k <= last; ++k) step(acc, w, both, [&] { return k < last || more; });
    }
    if (!pending) return;
    store_tile(problem, out, done, acc, memory, warpgroup);
    if (threadIdx.x % 128 == 0) store_wait();
  }

  static __device__ __forceinline__ void clear(float (&acc)[WAVES][2][SUMS]) {
#pragma unroll
    for (int i = 0; i < WAVES * 2 * SUMS; ++i) acc[i / SUMS / 2][i / SUMS % 2][i % SUMS] = 0.0f;
  }
};

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
