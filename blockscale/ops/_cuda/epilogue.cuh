// From the accumulators of a warpgroup to memory: through shared memory, so that the copy engine stores while the
// next tile is multiplied. Included by fp8_gemm.cu, whose names it uses.
#pragma once

// Calls function(row of the 64, column, x, y) for the pairs of neighbouring sums from column FROM to column TO.
template <int FROM, int TO, class Function>
__device__ __forceinline__ void each_pair(const float (&sums)[SUMS], const Problem& problem, int n0, int columns,
                                          Function&& function) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = FROM / 2; i < TO / 2; i += 2) {
    const int column = i / 4 * 8 + lane % 4 * 2;
    float x = sums[i], y = sums[i + 1];
    if (BIAS != 0 && column < columns) {
      x += bias_at(problem.bias, n0 + column);
      y += bias_at(problem.bias, n0 + column + 1);
    }
    function(row + i / 2 % 2 * 8, column, x, y);
  }
}

// The end of an expert's rows, when masked: rows after it must not be touched, so no box fits.
__device__ __forceinline__ void store_ragged(const Problem& problem, const Tile& tile, const float (&sums)[SUMS], int row0,
                                             int n0, int columns) {
  u8* const out = static_cast<u8*>(problem.out) + tile.expert * problem.out_expert * OUT_SIZE;
  each_pair<0, UNIT_N>(sums, problem, n0, columns, [&](int row, int column, float x, float y) {
    if (row0 + row >= tile.rows || column >= columns) return;
    u8* const to = out + ((row0 + row) * problem.out_row + n0 + column) * OUT_SIZE;
    if constexpr (OUT_F32) {
      store8(to, __float_as_uint(x), __float_as_uint(y));
    } else {
      store4(to, pack(x, y));
    }
  });
}

// Box number BOX of a warpgroup's: 64 rows of BOX_N columns, swizzled as the copy engine does.
template <int BOX>
__device__ __forceinline__ void store_boxes(const Problem& problem, const TensorMap* map, const Tile& tile,
                                            const float (&acc)[WAVES][SUMS], Memory memory, int warpgroup,
                                            int first_row, int n0) {
  if constexpr (BOX < WAVES * BOXES) {
    constexpr int WAVE = BOX / BOXES, FROM = BOX % BOXES * BOX_N;
    const bool leader = threadIdx.x % 128 == 0;
    const int row0 = tile.m0 + first_row + WAVE * 64, columns = problem.n - n0;
    if (KIND == 2 && row0 + 64 > tile.rows) {
      if constexpr (FROM == 0) store_ragged(problem, tile, acc[WAVE], row0, n0, min(columns, UNIT_N));
    } else {
      const u32 staged = memory.staged() + (warpgroup * STAGED + BOX % STAGED) * (64 * LINE_BYTES);
      if (leader) store_wait<STAGED - 1>();
      named_sync(1 + warpgroup, 128);
      each_pair<FROM, FROM + BOX_N>(acc[WAVE], problem, n0, columns, [&](int row, int column, float x, float y) {
        const u32 plain = staged + row * LINE_BYTES + (column - FROM) * OUT_SIZE;
        const u32 at = plain ^ ((plain >> 7 & (LINE_BYTES / 16 - 1)) << 4);
        if constexpr (OUT_F32) {
          store_shared2(at, x, y);
        } else {
          store_shared_bits(at, pack(x, y));
        }
      });
      copy_engine_fence();
      named_sync(1 + warpgroup, 128);
      if (leader) {
        store_box(map, staged, n0 + FROM, row0, KIND == 2 ? tile.expert : 0);
        store_commit();
      }
    }
    store_boxes<BOX + 1>(problem, map, tile, acc, memory, warpgroup, first_row, n0);
  }
}
