// From the accumulators of a warpgroup to memory, without shared memory: four lanes that hold eight columns of a
// row in pieces of two exchange them, so that every lane stores 16 bytes and four of them 64 bytes of a row.
// Included by fp8_gemm.cu, whose names it uses.
#pragma once

template <int VALUE>
struct Number {
  static constexpr int value = VALUE;
};

template <int FIRST_UNIT = 0, class Function>
__device__ __forceinline__ void each_unit(Function&& function) {
  if constexpr (FIRST_UNIT < UNITS) {
    function(Number<FIRST_UNIT>{});
    each_unit<FIRST_UNIT + 1>(function);
  }
}

// x of an even lane and y of its odd neighbour (lanes that differ in bit `mask`) stay, the others change places.
__device__ __forceinline__ void exchange(u32& x, u32& y, int lane, int mask) {
  const bool odd = lane & mask;
  const u32 got = __shfl_xor_sync(0xffffffff, odd ? x : y, mask);
  x = odd ? got : x;
  y = odd ? y : got;
}

__device__ __forceinline__ void store_tile(const Problem& problem, const Tile& tile, const float (&acc)[UNITS][SUMS],
                                           int first_row) {
  constexpr int BLOCKS = BN / 8, UNIT_BLOCKS = UNIT_N / 8, SIZE = OUT_F32 ? 4 : 2;
  const int lane = threadIdx.x % 32, quarter = lane % 4;
  const int row0 = tile.m0 + first_row + threadIdx.x % 128 / 32 * 16 + lane / 4;
  u8* const out = static_cast<u8*>(problem.out) + (KIND == 2 ? tile.expert * problem.out_expert * SIZE : 0);

#pragma unroll
  for (int half = 0; half < 2 * WAVES; ++half) {
    const int row = row0 + half / 2 * 64 + half % 2 * 8;
    const int limit = row < tile.rows ? problem.n - tile.n0 : 0;  // columns to store
    u8* const line = out + (row * problem.out_row + tile.n0) * SIZE;
    // Columns 2 * quarter and 2 * quarter + 1 of eight.
    auto pair = [&](int block, float& x, float& y) {
      const float(&unit)[SUMS] = acc[half / 2 * NSPLIT + block / UNIT_BLOCKS];
      x = unit[block % UNIT_BLOCKS * 4 + half % 2 * 2];
      y = unit[block % UNIT_BLOCKS * 4 + half % 2 * 2 + 1];
      if (BIAS != 0 && block * 8 < limit) {
        x += bias_at(problem.bias, tile.n0 + block * 8 + quarter * 2);
        y += bias_at(problem.bias, tile.n0 + block * 8 + quarter * 2 + 1);
      }
    };
    auto packed = [&](int block) {
      float x, y;
      pair(block, x, y);
      return pack(x, y);
    };
    if constexpr (OUT_F32) {
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        float x, y;
        pair(block, x, y);
        if (block * 8 < limit) {
          store8(line + (block * 8 + quarter * 2) * 4, __float_as_uint(x), __float_as_uint(y));
        }
      }
    } else {
#pragma unroll
      for (int block = 0; block + 4 <= BLOCKS; block += 4) {
        u32 v0 = packed(block), v1 = packed(block + 1), v2 = packed(block + 2), v3 = packed(block + 3);
        exchange(v0, v1, lane, 1);
        exchange(v2, v3, lane, 1);
        exchange(v0, v2, lane, 2);
        exchange(v1, v3, lane, 2);
        const int column = (block + quarter) * 8;
        if (column < limit) store16(line + column * 2, v0, v1, v2, v3);
      }
      if constexpr (BLOCKS % 4 == 2) {
        u32 v0 = packed(BLOCKS - 2), v1 = packed(BLOCKS - 1);
        exchange(v0, v1, lane, 1);
        const int column = (BLOCKS - 2 + quarter % 2) * 8 + quarter / 2 * 4;
        if (column < limit) store8(line + column * 2, v0, v1);
      }
    }
  }
}
