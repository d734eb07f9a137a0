// One warpgroup's stages, for tiles of which few rows of a may count: chunks of UNIT_M rows, of which those at the end
// are neither loaded nor multiplied if no row of them counts (step_few), and a loop over units where all do (step).
// Included by w4a8_gemm.cu, whose names it uses.
//
// A unit is 64 rows of w by a chunk. Unit u of a stage belongs to wave u / CHUNKS and to chunk u % CHUNKS; its sums lie
// in part[u % 2]. They are multiplied by w_scale, which frees the registers, unit u + 2 is started, and only then comes
// the other half of the promotion. All units of a wave stand together: its operand is free for the next stage while the
// other wave is multiplied, and is made then. No two paths meet, and no loop ends, where products are in flight, or the
// compiler waits for every one of them: hence two loops.
#pragma once

constexpr int UNITS = 2 * CHUNKS;
static_assert(WAVES == 2 && CHUNKS == 4, "units");

struct Multiplier {
  const Problem& problem;
  const TensorMap* out;
  const Memory memory;
  const int warpgroup;
  const u32 my_words, my_w_scale, my_a_scale;  // bytes from the first of a stage to this thread's
  Slot slot;                                   // the stage whose operands are made next

  using Sums = float[WAVES][CHUNKS][SUMS];

  __device__ __forceinline__ Multiplier(const Problem& problem, const TensorMap* out, Memory memory, int warpgroup)
      : problem(problem),
        out(out),
        memory(memory),
        warpgroup(warpgroup),
        my_words(warpgroup * UNIT_N * LINE + words_of_lane()),
        my_w_scale((warpgroup * UNIT_N + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) * 4),
        my_a_scale(threadIdx.x % 4 * 8) {}

  // The upper (0) or lower (1) rows of the operand of a wave.
  __device__ __forceinline__ void make(Operand& w, int wave, int stage, int lower) const {
    unpack_rows(w, memory.words(stage) + my_words + wave * 64 * LINE,
                memory.w_scale(stage) + my_w_scale + wave * 64 * 4, lower);
  }

  __device__ __forceinline__ void make(Operand& w, int wave, int stage) const {
    make(w, wave, stage, 0);
    make(w, wave, stage, 1);
  }

  // Scales of the upper and lower row of a wave.
  __device__ __forceinline__ void load_rows(float (&rows)[2], int stage, int wave) const {
    const u32 from = memory.w_scale(stage) + my_w_scale + wave * 64 * 4;
    rows[0] = scale_value(load_shared(from));
    rows[1] = scale_value(load_shared(from + 8 * 4));
  }

  // Scales of the rows of a of a chunk.
  __device__ __forceinline__ void load_columns(float2 (&columns)[UNIT_M / 8], int stage, int chunk) const {
#pragma unroll
    for (int j = 0; j < UNIT_M / 8; ++j) {
      columns[j] = load_shared2(memory.a_scale(stage) + my_a_scale + (chunk * UNIT_M + j * 8) * 4);
    }
  }

  static __device__ __forceinline__ u32 chunk_of(u32 a, int chunk) { return a + (chunk * UNIT_M * BK >> 4); }

  // Starts the first two units of a stage.
  __device__ __forceinline__ void lead(float (&part)[2][SUMS], Operand (&w)[WAVES], int stage) const {
    const u32 a = operand_start(memory.a(stage));
    start(part[0], w[0], a);
    start(part[1], w[0], chunk_of(a, 1));
  }

  // Adds the products of a stage, whose first units are in flight, to acc. w[1] is made for it, w[0] for the next
  // stage, if there is `another`.
  __device__ __forceinline__ void step(Sums& acc, float (&part)[2][SUMS], Operand (&w)[WAVES], int& stage,
                                       const bool& another) {
    const u32 a = operand_start(memory.a(stage));
    float rows[WAVES][2];
    slot.advance();
    load_rows(rows[0], stage, 0);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int ahead = u + 2, wave = u / CHUNKS, chunk = u % CHUNKS;
      float scaled[SUMS];
      if (u + 1 < UNITS) wgmma_wait<1>();
      else wgmma_wait<0>();
      pin(part[u % 2]);
      pin(w[wave]);
#pragma unroll
      for (int i = 0; i < SUMS; ++i) scaled[i] = part[u % 2][i] * rows[wave][i / 2 % 2];
      pin(scaled);
      if (ahead < UNITS) start(part[ahead % 2], w[ahead / CHUNKS], chunk_of(a, ahead % CHUNKS));
      __syncwarp();  // to the compiler, the end of what it may mix with starting the products
      float2 columns[UNIT_M / 8];
      load_columns(columns, stage, chunk);
      if (u + 1 == CHUNKS) load_rows(rows[1], stage, 1);
      prepare(w, stage, u, another);
      add(acc[wave][chunk], scaled, columns);
    }
    release(memory.empty(stage));
    stage = slot.stage;
  }

  // What is made of operands beside unit u: in the first wave those of the second, in the second those of the next
  // stage.
  __device__ __forceinline__ void prepare(Operand (&w)[WAVES], int stage, int u, const bool& another) {
    if (u == 0) make(w[1], 1, stage, 0);
    if (u == 1) make(w[1], 1, stage, 1);
    if (u == CHUNKS && another) barrier_wait(memory.full(slot.stage), slot.phase);
    if (u == CHUNKS) make(w[0], 0, slot.stage, 0);
    if (u == CHUNKS + 1) make(w[0], 0, slot.stage, 1);
  }

  static __device__ __forceinline__ void add(float (&acc)[SUMS], const float (&scaled)[SUMS],
                                             const float2 (&columns)[UNIT_M / 8]) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) acc[i] = fmaf(scaled[i], i % 2 ? columns[i / 4].y : columns[i / 4].x, acc[i]);
  }

  // The same for a tile of which `chunks` chunks count, fewer than there are; nothing is in flight before or after.
  __device__ __forceinline__ void step_few(Sums& acc, Operand (&w)[WAVES], int& stage, int chunks, bool another) {
    const u32 a = operand_start(memory.a(stage));
    slot.advance();
    float rows[WAVES][2], few[WAVES][SUMS];
#pragma unroll
    for (int wave = 0; wave < WAVES; ++wave) load_rows(rows[wave], stage, wave);
#pragma unroll
    for (int chunk = 0; chunk + 1 < CHUNKS; ++chunk) {
      if (chunk == 0 || chunk < chunks) {
        float2 columns[UNIT_M / 8];
        start(few[0], w[0], chunk_of(a, chunk));
        if (chunk == 0) make(w[1], 1, stage);
        start(few[1], w[1], chunk_of(a, chunk));
        load_columns(columns, stage, chunk);
        wgmma_wait<0>();
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) {
          pin(few[wave]);
          pin(w[wave]);
#pragma unroll
          for (int i = 0; i < SUMS; ++i) few[wave][i] *= rows[wave][i / 2 % 2];
          add(acc[wave][chunk], few[wave], columns);
        }
      }
    }
    release(memory.empty(stage));
    stage = slot.stage;
    if (!another) return;
    barrier_wait(memory.full(stage), slot.phase);
    make(w[0], 0, stage);
  }

  __device__ __forceinline__ void run() {
    Scheduler scheduler(problem);
    Tile tile, done;
    Sums acc;
    float part[2][SUMS];
    Operand w[WAVES];
    int stage = 0;
    const int last = problem.steps - 1;
    bool more = scheduler.take(tile), pending = false;
    if (!more) return;
    barrier_wait(memory.full(0), 0);
    make(w[0], 0, 0);
    const auto turn_over = [&] {
      if (pending) store_tile(problem, out, done, acc, memory, warpgroup);
      clear(acc);
      done = tile;
      pending = true;
      more = scheduler.take(tile);
    };
    while (more) {
      const int chunks = chunks_of(problem, tile);
      if (chunks < CHUNKS) {
        turn_over();
        for (int k = 0; k <= last; ++k) step_few(acc, w, stage, chunks, k < last || more);
        continue;
      }
      lead(part, w, stage);
      turn_over();
      step(acc, part, w, stage, last > 0 || more);
      for (int k = 1; k <= last; ++k) {
        lead(part, w, stage);
        step(acc, part, w, stage, k < last || more);
      }
    }
    store_tile(problem, out, done, acc, memory, warpgroup);
    if (threadIdx.x % 128 == 0) store_wait();
  }

  static __device__ __forceinline__ void clear(Sums& acc) {
#pragma unroll
    for (int i = 0; i < WAVES * CHUNKS * SUMS; ++i) acc[i / SUMS / CHUNKS][i / SUMS % CHUNKS][i % SUMS] = 0.0f;
  }
};
