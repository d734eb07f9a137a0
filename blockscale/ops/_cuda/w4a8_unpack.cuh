// From four-bit words in shared memory to E4M3 in the registers of the tensor cores' first operand; reference/w4.py
// says why these are the same numbers. Included by w4a8_gemm.cu, whose names it uses.
#pragma once

// Bytes from the first word of 64 rows to what this lane tells load_matrices: 16 bytes of a row of its warp's, where
// the copy engine put them, which swizzles rows of 64 bytes.
__device__ __forceinline__ u32 words_of_lane() {
  const int lane = threadIdx.x % 32, row = lane % 8;
  return (threadIdx.x % 128 / 32 * 16 + row) * LINE + ((lane / 8 ^ row / 2) << 4);
}

// The word with the codes of the high half bytes in the low ones: either has magnitudes at bits 0 to 2 and signs at bit
// 7 of every byte.
__device__ __forceinline__ u32 turned(u32 word) { return word >> 4 | word << 28; }

// Four INT4 codes.
__device__ __forceinline__ u32 from_int4(u32 word) { return word & 0x87878787; }

// Bit 7 of every byte at all bits of it.
__device__ __forceinline__ u32 spread(u32 word) {
  u32 bytes;
  asm("prmt.b32 %0, %1, 0, 0xBA98;" : "=r"(bytes) : "r"(word));
  return bytes;
}

// Four E2M1 codes (1 for zero); eights are added to the exponents of all.
__device__ __forceinline__ u32 from_mxfp4(u32 word, u32 eights) {
  const u32 bits = word << 2 & 0x1C1C1C1C;
  const u32 other = spread((bits ^ 0x04040404) + 0x7C7C7C7C);  // bit 7 was set where a code is not zero
  return ((bits + eights) & other) | (word & 0x80808080);
}

// Block number `block` of 32 of a row: what to add to its exponents, times 8 in every byte.
__device__ __forceinline__ u32 eights_of(u32 folded, int block) { return (folded >> 4 * block & 15) * 0x08080808; }

// The scale as it is multiplied; of MXFP4 the lower half tells of the four blocks.
__device__ __forceinline__ float scale_value(float scale) {
  if constexpr (MXFP4) return __uint_as_float(__float_as_uint(scale) & 0xFFFF0000);
  return scale;
}

// The operand of 64 rows and 128 of K: w[i] are this thread's registers of K = 32 i to 32 i + 31, in order: upper and
// lower row of the first 16, upper and lower row of the others. A word holds four codes of the first and four of the
// second 64 of K; its lane of four holds the words lane, lane + 4, lane + 8 and lane + 12. Only the upper (0) or the
// lower (1) rows.
__device__ __forceinline__ void unpack_rows(u32 (&w)[4][4], u32 words, u32 scales, int lower) {
  u32 word[4], folded = 0;
  load_matrices(word, words + lower * 8 * LINE);
  if constexpr (MXFP4) folded = __float_as_uint(load_shared(scales + lower * 8 * 4));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u32 &low = w[j / 2][j % 2 * 2 + lower], &high = w[2 + j / 2][j % 2 * 2 + lower];
    if constexpr (MXFP4) {
      low = from_mxfp4(word[j], eights_of(folded, j / 2));
      high = from_mxfp4(turned(word[j]), eights_of(folded, 2 + j / 2));
    } else {
      low = from_int4(word[j]);
      high = from_int4(turned(word[j]));
    }
  }
}

__device__ __forceinline__ void unpack(u32 (&w)[4][4], u32 words, u32 scales) {
  unpack_rows(w, words, scales, 0);
  unpack_rows(w, words, scales, 1);
}
