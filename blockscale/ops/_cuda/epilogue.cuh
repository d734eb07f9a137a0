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

// A wave to shared memory: boxes of LINE_BYTES a row, one after the other, swizzled as the copy engine does.
__device__ __forceinline__ void stage_wave(const float (&sums)[SUMS], const Problem& problem, int n0, int columns,
                                           u32 staged) {
  // Chunks of 16 bytes of a row change places: of all rows and columns, only these of the row and of the chunk matter.
  auto line = [&](int row) { return staged + row * LINE_BYTES + (row * LINE_BYTES / 128 % (LINE_BYTES / 16) << 4); };
  auto box = [](int byte) { return byte / LINE_BYTES * (64 * LINE_BYTES); };
  if constexpr (OUT_F32) {
    each_pair(sums, problem, n0, columns, [&](int row, int column, float x, float y) {
      const int byte = column * 4;
      store_shared2((line(row) ^ byte % LINE_BYTES / 16 << 4) + byte % 16 + box(byte), x, y);
    });
  } else {
    // Four matrices of 8 x 8 at a time: upper and lower rows of a warp's 16, of two times 8 columns.
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const u32 my_line = line(row) ^ (lane / 16 << 4);
    u32 packed[SUMS / 2];
    int i = 0;
    each_pair(sums, problem, n0, columns, [&](int, int, float x, float y) { packed[i++] = pack(x, y); });
#pragma unroll
    for (int j = 0; j < UNIT_N / 16; ++j) {
      const u32* const p = packed + 4 * j;
      store_matrices((my_line ^ j * 32 % LINE_BYTES) + box(j * 32), p[0], p[1], p[2], p[3]);
    }
  }
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
    stage_wave(acc[w], problem, n0, columns, staged);
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
