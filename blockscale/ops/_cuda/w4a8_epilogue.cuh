// From the accumulators of a warpgroup, which hold out transposed, to memory: through shared memory, so that the copy
// engine stores while the next tile is multiplied. Included by w4a8_gemm.cu, whose names it uses.
#pragma once

constexpr int OUT_LINE = 128;                       // bytes of a staged row of out: of a box, as wide as its swizzle
constexpr int BOX_COLUMNS = OUT_LINE / OUT_SIZE, BOX_BYTES = BM * OUT_LINE;

// The 16 bytes number `chunk` of a row of a box, swizzled as the copy engine does.
__device__ __forceinline__ u32 chunk_at(u32 box, int row, int chunk) {
  return box + row * OUT_LINE + ((chunk ^ row % 8) << 4);
}

__device__ __forceinline__ float plus(float sum, float bias) { return BIAS != 0 ? sum + bias : sum; }

// A wave, 64 columns of out from n0 on, to shared memory.
__device__ __forceinline__ void stage_wave(const float (&acc)[CHUNKS][SUMS], const Problem& problem, int n0,
                                           int columns, u32 staged) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int column = warp * 16 + lane / 4;  // of upper sums; lower ones belong to the eighth after it
  const float upper = BIAS != 0 && column < columns ? bias_at(problem.bias, n0 + column) : 0.0f;
  const float lower = BIAS != 0 && column < columns ? bias_at(problem.bias, n0 + column + 8) : 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const float(&sums)[SUMS] = acc[chunk];
    if constexpr (OUT_F32) {
#pragma unroll
      for (int i = 0; i < SUMS; ++i) {
        const int row = chunk * UNIT_M + i / 4 * 8 + lane % 4 * 2 + i % 2, mine = column + i / 2 % 2 * 8;
        const u32 to = chunk_at(staged + mine / BOX_COLUMNS * BOX_BYTES, row, mine % BOX_COLUMNS / 4) + mine % 4 * 4;
        store_shared(to, plus(sums[i], i / 2 % 2 ? lower : upper));
      }
    } else {
      // Four matrices of 8 x 8 at a time: upper and lower sums of two times eight rows.
      const u32 to = chunk_at(staged, chunk * UNIT_M + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
#pragma unroll
      for (int j = 0; j < UNIT_M / 16; ++j) {
        const float* const x = sums + 8 * j;
        store_matrices_transposed(to + j * 16 * OUT_LINE, pack(plus(x[0], upper), plus(x[1], upper)),
                                  pack(plus(x[2], lower), plus(x[3], lower)),
                                  pack(plus(x[4], upper), plus(x[5], upper)),
                                  pack(plus(x[6], lower), plus(x[7], lower)));
      }
    }
  }
}

// The staged rows before the end of an expert's, when masked: rows after it must not be touched, so no box fits.
__device__ __forceinline__ void store_ragged(const Problem& problem, const Tile& tile, int n0, int columns,
                                             u32 staged) {
  const int chunk = threadIdx.x % 8, column = chunk * (16 / OUT_SIZE);
  u8* const out = static_cast<u8*>(problem.out) + (tile.expert * problem.out_expert + n0 + column) * OUT_SIZE;
  for (int row = threadIdx.x % 128 / 8; row < min(tile.rows - tile.m0, BM); row += 16) {
#pragma unroll
    for (int box = 0; box < 64 / BOX_COLUMNS; ++box) {
      if (box * BOX_COLUMNS + column >= columns) continue;
      const float4 x = load_staged(chunk_at(staged + box * BOX_BYTES, row, chunk), 0, false);
      store16(out + ((tile.m0 + row) * problem.out_row + box * BOX_COLUMNS) * OUT_SIZE, __float_as_uint(x.x),
              __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w));
    }
  }
}

__device__ __forceinline__ void store_tile(const Problem& problem, const TensorMap* map, const Tile& tile,
                                           const float (&acc)[WAVES][CHUNKS][SUMS], Memory memory, int warpgroup) {
  const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
  for (int wave = 0; wave < WAVES; ++wave) {
    const int n0 = tile.n0 + warpgroup * UNIT_N + wave * 64, columns = min(problem.n - n0, 64);
    const u32 staged = memory.staged() + (warpgroup * STAGED_WAVES + wave % STAGED_WAVES) * STAGED_BYTES;
    if (wave % STAGED_WAVES == 0) {
      if (leader) store_wait();
      named_sync(1 + warpgroup, 128);
    }
    stage_wave(acc[wave], problem, n0, columns, staged);
    copy_engine_fence();
    named_sync(1 + warpgroup, 128);
    if (KIND == 2 && tile.m0 + BM > tile.rows) {
      store_ragged(problem, tile, n0, columns, staged);
    } else if (leader) {
#pragma unroll
      for (int box = 0; box < 64 / BOX_COLUMNS; ++box) {
        const int column = box * BOX_COLUMNS, expert = KIND == 2 ? tile.expert : 0;
        if (column < columns) store_box(map, staged + box * BOX_BYTES, n0 + column, tile.m0, expert);
      }
      store_commit();
    }
  }
}
