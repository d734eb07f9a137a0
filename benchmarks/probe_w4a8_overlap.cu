// Do products with the first operand in registers (64x64x32, E4M3) run beside the multiplications and additions of
// another warpgroup, as the promotion of w4a8_gemm.cu wants them to? And do the products of two warpgroups share the
// tensor cores evenly? For one block of two warpgroups, on Hopper:
//
//   nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -o probe_w4a8_overlap benchmarks/probe_w4a8_overlap.cu
//   ./probe_w4a8_overlap
//
// prints clock cycles a turn. A turn of products is eight instructions (256 cycles where the tensor cores never wait)
// and a wait for them; a turn of arithmetic 64 FMUL and 128 FFMA of every warp (256 as written: two FFMA share a FMUL).
// One turn is mostly the latency of starting. results/probes/w4a8_overlap.txt has the answers of an H200, of an earlier
// form of this file with the same loops, which printed the first turn too; KERNELS.md what follows from them.
#include <cstdio>

typedef unsigned u32;
typedef unsigned long long u64;

enum Work { NOTHING = 0, PRODUCTS = 1, ARITHMETIC = 2 };

__device__ __forceinline__ u32 clock_now() {
  u32 now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i]));
}

// d += a * b for 64 x 64 sums and 32 of K.
__device__ __forceinline__ void product(float (&d)[32], const u32 (&a)[4], u64 b) {
  asm volatile(
      "{\nwgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// cycles[warpgroup] of `turns` of work[warpgroup]; the second warpgroup starts its products `late` cycles late.
__global__ void __launch_bounds__(256, 1)
    probe(Work first, Work second, int turns, u32 late, u32* cycles, float* sink, float r, float c) {
  __shared__ __align__(1024) unsigned char memory[8192];
  for (int i = threadIdx.x; i < 8192; i += 256) memory[i] = 0;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const int warpgroup = threadIdx.x / 128;
  const Work work = warpgroup == 0 ? first : second;
  const u64 b = u64(0x40000040) << 32 | 1u << 16 | u32(__cvta_generic_to_shared(memory)) >> 4;
  float acc[64], part[32];
  u32 w[4][4];
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = r * i;
#pragma unroll
  for (int i = 0; i < 32; ++i) part[i] = c * i;
#pragma unroll
  for (int i = 0; i < 16; ++i) w[i / 4][i % 4] = 0;
  __syncthreads();
  const u32 began = clock_now();
  if (work == PRODUCTS) {
    while (warpgroup == 1 && clock_now() - began < late) {
    }
    for (int k = 0; k < turns; ++k) {
      pin(part);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < 8; ++i) product(part, w[i % 4], b + 2 * (i % 4));
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
      pin(part);
    }
  } else if (work == ARITHMETIC) {
    for (int k = 0; k < 2 * turns; ++k) {
#pragma unroll
      for (int i = 0; i < 64; ++i) acc[i] = fmaf(part[i % 32] * r, c, acc[i]);
      pin(part);
    }
  }
  const u32 took = clock_now() - began;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) sum += acc[i] + part[i / 2];
  if (sum == 12345.678f) *sink = sum;  // never, but the compiler does not know
  if (threadIdx.x % 128 == 0) cycles[warpgroup] = took;
}

int main() {
  u32* cycles;
  float* sink;
  cudaMalloc(&cycles, 2 * sizeof(u32));
  cudaMalloc(&sink, sizeof(float));
  const struct {
    const char* name;
    Work first, second;
    u32 late;
  } cases[] = {
      {"products alone", PRODUCTS, NOTHING, 0},
      {"arithmetic alone", NOTHING, ARITHMETIC, 0},
      {"products beside arithmetic", PRODUCTS, ARITHMETIC, 0},
      {"products of both", PRODUCTS, PRODUCTS, 0},
      {"products of both, the second 60 cycles late", PRODUCTS, PRODUCTS, 60},
      {"products of both, the second 128 cycles late", PRODUCTS, PRODUCTS, 128},
  };
  for (const int turns : {1, 2000}) {
    for (const auto& each : cases) {
      u32 found[2];
      for (int i = 0; i < 3; ++i) {
        probe<<<1, 256>>>(each.first, each.second, turns, each.late, cycles, sink, 1.0f, 0.5f);
      }
      cudaMemcpy(found, cycles, sizeof found, cudaMemcpyDeviceToHost);
      std::printf("%d turns, %s: %.1f and %.1f cycles a turn, %s\n", turns, each.name, double(found[0]) / turns,
                  double(found[1]) / turns, cudaGetErrorString(cudaGetLastError()));
    }
  }
}
