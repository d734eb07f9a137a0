// From the accumulators of a warpgroup to memory: through shared memory, so that the copy engine stores while the
// next tile is multiplied. Included by fp8_gemm.cu, whose names it uses.
#pragma once

// Calls function(row of the 64, column, x, y) for every pair of neighbouring sums of a wave.
template <class Function>
__device__ __forceinline__ void each_pair(const float (&sums)[SUMS], const Problem& problem, int n0, int columns,
                                          Function&& function) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < SUMS; i += 2) {
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
__device__ __forceinline__ void store_ragged(const Problem& problem, const Tile& tile, const float (&sums)[SUMS],
                                             int row0, int n0, int columns) {
  u8* const out = static_cast<u8*>(problem.out) + tile.expert * problem.out_expert * OUT_SIZE;
  each_pair(sums, problem, n0, columns, [&](int row, int column, float x, float y) {
    if (row0 + row >= tile.rows || column >= columns) return;
    u8* const to = out + ((row0 + row) * problem.out_row + n0 + column) * OUT_SIZE;
    if constexpr (OUT_F32) {
      store8(to, __float_as_uint(x), __float_as_uint(y));
    } else {
      store4(to, pack(x, y));
    }
  });
}

__device__ __forceinline__ void store_tile(const Problem& problem, const TensorMap* map, const Tile& tile,
                                           const float (&acc)[WAVES][SUMS], Memory memory, int warpgroup,
                                           int first_row, int n0) {
  const bool leader = threadIdx.x % 128 == 0;
  const int columns = min(problem.n - n0, UNIT_N);
#pragma unroll
  for (int w = 0; w < WAVES; ++w) {
    const int row0 = tile.m0 + first_row + w * 64;
    if (KIND == 2 && row0 + 64 > tile.rows) {
      store_ragged(problem, tile, acc[w], row0, n0, columns);
      continue;
    }
    const u32 staged = memory.staged() + (warpgroup * STAGED_WAVES + w % STAGED_WAVES) * STAGED_BYTES;
    if (w % STAGED_WAVES == 0) {
      if (leader) store_wait();
      named_sync(1 + warpgroup, 128);
    }
    each_pair(acc[w], problem, n0, columns, [&](int row, int column, float x, float y) {
      // Boxes of LINE_BYTES a row, one after the other, swizzled as the copy engine does.
      const int byte = column * OUT_SIZE;
      const u32 plain = staged + byte / LINE_BYTES * 64 * LINE_BYTES + row * LINE_BYTES + byte % LINE_BYTES;
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
#pragma unroll
      for (int box = 0; box < UNIT_N * OUT_SIZE / LINE_BYTES; ++box) {
        const int column = box * (LINE_BYTES / OUT_SIZE), expert = KIND == 2 ? tile.expert : 0;
        if (column < columns) store_box(map, staged + box * 64 * LINE_BYTES, n0 + column, row0, expert);
      }
      store_commit();
    }
  }
}
