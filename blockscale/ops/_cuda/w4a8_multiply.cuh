// One warpgroup's stages, with its products waited for before they are promoted: the plain loop. Included by
// w4a8_gemm.cu, whose names it uses.
#pragma once

static_assert(CHUNKS == 2, "halves");

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

  // Adds the products of a stage to acc, of the second half of the rows only if `both` count; w[0] has been made, and
  // is made for the next stage. meanwhile() is called while the tensor cores work, before acc is used; it tells whether
  // there is a next stage.
  template <class Function>
  __device__ __forceinline__ void step(float (&acc)[WAVES][CHUNKS][SUMS], Operand (&w)[WAVES], const bool& both,
                                       Function&& meanwhile) {
    const int stage = slot.stage;
    const u32 a = operand_start(memory.a(stage));
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
    float acc[WAVES][CHUNKS][SUMS];
    Operand w[WAVES];
    const int last = problem.steps - 1;
    bool more = scheduler.take(tile), pending = false, both = true;
    if (more) begin(w[0]);
    while (more) {
      step(acc, w, both, [&] {
        if (pending) store_tile(problem, out, done, acc, memory, warpgroup);
        clear(acc);
        done = tile;
        both = counts(problem, tile, 1);
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

  static __device__ __forceinline__ void clear(float (&acc)[WAVES][CHUNKS][SUMS]) {
#pragma unroll
    for (int i = 0; i < WAVES * CHUNKS * SUMS; ++i) acc[i / SUMS / CHUNKS][i / SUMS % CHUNKS][i % SUMS] = 0.0f;
  }
};

