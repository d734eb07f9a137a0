// The obvious fast C++: a branchless float32 loop per row of a block, divided, rounded to E4M3 by integer arithmetic.
// A yardstick for bench_cast.py, which compiles it with -O3 -march=native; bit-equal to the reference for finite BF16
// weights (N, K) in 128 x 128 blocks. Rows row0 ... row1 - 1; row0 is a multiple of 128.
#include <algorithm>
#include <cstdint>
#include <cstring>

static const int64_t BLOCK = 128;

static inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline uint32_t e4m3_magnitude(float value) {
    uint32_t bits = as_bits(value);
    uint32_t normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120u << 23)) >> 20;
    uint32_t subnormal = as_bits(value + 16384.0f) - 0x46800000u;
    uint32_t below = 0u - uint32_t(int32_t(bits) < int32_t(121u << 23));  // a mask: gcc makes a branch of "?:"
    return normal ^ ((normal ^ subnormal) & below);
}

extern "C" void quantize(const uint16_t* weight, uint8_t* codes, float* scale, int64_t n, int64_t k, int64_t row0,
                         int64_t row1, int ue8m0) {
    int64_t grid_k = (k + BLOCK - 1) / BLOCK;
    for (int64_t top = row0; top < row1; top += BLOCK) {
        int64_t bottom = std::min(top + BLOCK, n);
        for (int64_t block = 0; block < grid_k; block++) {
            int64_t left = block * BLOCK, width = std::min(BLOCK, k - left);
            uint16_t amax = 0;
            for (int64_t row = top; row < bottom; row++) {
                const uint16_t* x = weight + row * k + left;
                for (int64_t i = 0; i < width; i++) amax = std::max<uint16_t>(amax, x[i] & 0x7FFF);
            }
            float s = std::max(as_float(uint32_t(amax) << 16) / 448.0f, 1.17549435e-38f);
            if (ue8m0) s = as_float((as_bits(s) + 0x7FFFFF) & 0xFF800000u);
            if (amax == 0) s = 1.0f;
            scale[top / BLOCK * grid_k + block] = s;
            for (int64_t row = top; row < bottom; row++) {
                const uint16_t* __restrict__ x = weight + row * k + left;
                uint8_t* __restrict__ q = codes + row * k + left;
                for (int64_t i = 0; i < width; i++) {
                    uint32_t magnitude = e4m3_magnitude(as_float(uint32_t(x[i] & 0x7FFF) << 16) / s);
                    q[i] = uint8_t(magnitude | ((x[i] >> 8) & 0x80));
                }
            }
        }
    }
}

extern "C" void dequantize(const uint8_t* codes, const float* scale, uint16_t* out, int64_t n, int64_t k, int64_t row0,
                           int64_t row1) {
    int64_t grid_k = (k + BLOCK - 1) / BLOCK;
    for (int64_t row = row0; row < std::min(row1, n); row++) {
        for (int64_t block = 0; block < grid_k; block++) {
            int64_t left = block * BLOCK, width = std::min(BLOCK, k - left);
            // Magnitude bits become those of a float32 that is 2^120 times too small.
            float s = scale[row / BLOCK * grid_k + block] * 1.32922799578491587e36f;
            const uint8_t* __restrict__ q = codes + row * k + left;
            uint16_t* __restrict__ y = out + row * k + left;
            for (int64_t i = 0; i < width; i++) {
                uint32_t bits = as_bits(as_float(uint32_t(q[i] & 0x7F) << 20) * s);
                y[i] = uint16_t(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) | uint32_t(q[i] & 0x80) << 8);
            }
        }
    }
}
