// One warpgroup's stages, with its products waited for before they are promoted: the plain loop. Included by
// w4a8_gemm.cu, whose names it uses.
//
// Left to themselves the two warpgroups keep the step they started in: where tensor cores serve both alike, both wait
// for products at the same time and both promote at the same time. TURNS = 1: one starts products only when the other's
// are half done. TURNS = 2: the second merely starts later, by the time of the first one's products.
#pragma once

static_assert(TURNS == 0 || WGS == 2, "turns are between two");

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
  __device__ __forceinline__ void promote(float (&acc)[WAVES][CHUNKS][SUMS], const float (&part)[WAVES][SUMS],
                                          int stage, int half) const {
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
  __device__ __forceinline__ void step(float (&acc)[WAVES][CHUNKS][SUMS], Operand (&w)[WAVES], const bool& both,
                                       Function&& meanwhile) {
    const int stage = slot.stage;
    const u32 a = operand_start(memory.a(stage));
    float part[WAVES][SUMS];
    if constexpr (TURNS == 1) {
      if constexpr (WAVES == 2) make(w[1], 1);
      take_turn();
#pragma unroll
      for (int wave = 0; wave < WAVES; ++wave) start(part[wave], w[wave], a);
      wgmma_wait<WAVES - 1>();
      pass_turn();
    } else {
      start(part[0], w[0], a);
      if constexpr (WAVES == 2) {
        make(w[1], 1);
        start(part[1], w[1], a);
      }
    }
    const bool another = meanwhile();
    finish(part, w);
    promote(acc, part, stage, 0);

    slot.advance();
    if (both) {
      take_turn();
#pragma unroll
      for (int wave = 0; wave < WAVES; ++wave) start(part[wave], w[wave], a + (UNIT_M * BK >> 4));
      wgmma_wait<WAVES - 1>();
      pass_turn();
      pin(w[0]);
      if (another) begin(w[0]);
      finish(part, w);
      promote(acc, part, stage, 1);
    } else if (another) {
      begin(w[0]);
    }
    release(memory.empty(stage));
  }

  __device__ __forceinline__ void take_turn() const {
    if constexpr (TURNS == 1) named_sync(1 + WGS + warpgroup, MATH_THREADS);
  }

  __device__ __forceinline__ void pass_turn() const {
    if constexpr (TURNS == 1) named_arrive(2 + WGS - warpgroup, MATH_THREADS);
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
    float acc[WAVES][CHUNKS][SUMS];
    Operand w[WAVES];
    const int last = problem.steps - 1;
    bool more = scheduler.take(tile), pending = false, both = true;
    if (more) begin(w[0]);
    if (TURNS == 1 && warpgroup == 1) pass_turn();
    if (TURNS == 2 && warpgroup == 1) pause(64 * WAVES * UNIT_M / 32);
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
    if (TURNS == 1 && warpgroup == 0) take_turn();
    if (!pending) return;
    store_tile(problem, out, done, acc, memory, warpgroup);
    if (threadIdx.x % 128 == 0) store_wait();
  }

  static __device__ __forceinline__ void clear(float (&acc)[WAVES][CHUNKS][SUMS]) {
#pragma unroll
    for (int i = 0; i < WAVES * 2 * SUMS; ++i) acc[i / SUMS / 2][i / SUMS % 2][i % SUMS] = 0.0f;
  }
};

