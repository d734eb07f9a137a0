// The few PTX instructions of Hopper that the GEMM kernels use, one small function each. No CUDA header is
// included, so that NVRTC needs no toolkit and compiles in about a second.
//
// Shared memory addresses are 32-bit values of the shared window. Tensor maps are 3-D: (column, row, expert).
#pragma once

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct __align__(64) TensorMap {
  u64 opaque[16];
};

// The arguments of a GEMM besides the tensor maps; `fp8_gemm.py` fills it in the same order.
struct Problem {
  const float* b_scale;
  void* out;
  const void* bias;
  const int* layout;         // m_indices or masked_m
  i64 out_row, out_expert;   // strides in elements
  int m, n, experts;         // m: rows, of one expert if masked
  int steps;                 // ceil(K / 128)
  int scale_rows;            // ceil(N / 128)
  int m_tiles, n_tiles;      // what a cluster computes at a time; m_tiles is not used by masked
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster is here. Publishes nothing: that takes a fence before it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What the kernel launched before has written is visible from here on, if this one was launched to overlap it.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may be set up while this one runs; it waits itself before it touches memory.
__device__ __forceinline__ void admit_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- mbarriers -----------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine and to the other block of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier at the same address in block `rank` of the cluster. Orders reads before it, as a ring
// needs; for data that the other block is to read see barrier_publish.
__device__ __forceinline__ void barrier_arrive_remote(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// As barrier_arrive_remote, and what was written before is visible to who waits with barrier_wait_cluster. Costs
// a full memory barrier.
__device__ __forceinline__ void barrier_publish(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Whether the phase is over; never waits.
__device__ __forceinline__ bool barrier_test(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// As barrier_wait, and what the other blocks of the cluster wrote before they arrived is visible.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// A slot of the ring of stages, and the parity of the barrier phase of its current use.
struct Slot {
  int stage = 0;
  u32 phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---- the copy engine -----------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 barrier, int column, int row, int expert) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(to), "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(column), "r"(row), "r"(expert)
      : "memory");
}

// Second-level cache policy for lines that are read once: they are the first to be replaced.
__device__ __forceinline__ u64 read_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The usual policy.
__device__ __forceinline__ u64 read_again() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void load_box_policy(u32 to, const TensorMap* map, u32 barrier, int column, int row,
                                                int expert, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;"
      ::"r"(to), "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(column), "r"(row), "r"(expert), "l"(policy)
      : "memory");
}

// The same box into both blocks of the cluster, at the same address, signalling the barrier of each.
__device__ __forceinline__ void load_box_both(u32 to, const TensorMap* map, u32 barrier, int column, int row,
                                              int expert) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;"
      ::"r"(to), "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(column), "r"(row), "r"(expert),
      "h"(static_cast<unsigned short>(3))
      : "memory");
}

// A box from shared memory to memory, what lies inside the array of it; runs on after the call.
__device__ __forceinline__ void store_box(const TensorMap* map, u32 from, int column, int row, int expert) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                   reinterpret_cast<u64>(map)),
               "r"(from), "r"(column), "r"(row), "r"(expert)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// What this thread's stores read may be overwritten from here on.
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// What this thread wrote to shared memory is visible to the copy engine.
__device__ __forceinline__ void copy_engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor cores --------------------------------------------------------------------------------------

// Operand in shared memory, rows of 128 bytes (K-major), 128-byte swizzle: 1024 bytes from one group of eight
// rows to the next. Advancing K by 32 bytes adds 2 to the descriptor.
__device__ __forceinline__ u64 operand(u32 address) {
  return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | u64(address >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving accesses to the registers across this point.
template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void pin(u32 (&registers)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- memory --------------------------------------------------------------------------------------------

__device__ __forceinline__ float load_shared(u32 address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float2 load_shared2(u32 address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared2(u32 address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// Four matrices of 8 x 8 bfloat16, of each the two elements that the tensor cores left to this lane. Lane l gives the
// address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(u32 row, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// The same, each matrix transposed: lane l gives the address of column l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(u32 column, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(column), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Four matrices of eight rows of 16 bytes: this lane gets bytes 4 * (lane % 4) on of row lane / 4 of each. Lane l gives
// the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&words)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// Four floats at `address` in the shared memory of block `rank` of the cluster, or of this block.
__device__ __forceinline__ float4 load_staged(u32 address, u32 rank, bool cluster) {
  float4 v;
  if (cluster) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(rank)
        : "memory");
  } else {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
  }
  return v;
}

__device__ __forceinline__ void store16(void* to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.global.L1::no_allocate.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void store8(void* to, u32 a, u32 b) {
  asm volatile("st.global.L1::no_allocate.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ void store4(void* to, u32 a) {
  asm volatile("st.global.L1::no_allocate.b32 [%0], %1;" ::"l"(to), "r"(a) : "memory");
}

__device__ __forceinline__ int load_int(const int* from) {
  int value;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

// Two float32 as two bfloat16, the first in the low half, rounded to nearest even.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Element `column` of the bias: BIAS is 0 for none, 1 for bfloat16, 2 for float32.
__device__ __forceinline__ float bias_at(const void* bias, int column) {
  if constexpr (BIAS == 0) return 0.0f;
  if constexpr (BIAS == 1) return __uint_as_float(u32(static_cast<const unsigned short*>(bias)[column]) << 16);
  return static_cast<const float*>(bias)[column];
}
