// Which tiles a persistent block computes, for kernels of many rows. Included where BM x BN is the tile of a block,
// SUPER_M x SUPER_N that of its cluster, and rows_of(problem, expert) tells how many rows an expert has.
#pragma once

struct Tile {
  int m0, n0;  // first row (within the expert if masked) and column
  int expert;
  int rows;    // rows from here on are not stored
};

// Hands out the tiles of this block, in an order in which tiles that run together share rows and columns.
struct Scheduler {
  const Problem& problem;
  int index, step, rank;
  int expert = 0, before = 0;  // masked: where the walk over the experts is, tiles of the experts before

  __device__ explicit Scheduler(const Problem& p)
      : problem(p), index(blockIdx.x / CLUSTER), step(gridDim.x / CLUSTER), rank(CLUSTER == 2 ? cluster_rank() : 0) {}

  __device__ __forceinline__ void place(Tile& tile, int local, int m_tiles) {
    const int per_band = GROUP * problem.n_tiles;
    const int band = local / per_band, in_band = local - band * per_band;
    const int height = min(GROUP, m_tiles - band * GROUP);
    const int n_tile = in_band / height;
    tile.m0 = (band * GROUP + in_band - n_tile * height) * SUPER_M + (SHARE_A ? 0 : rank * BM);
    tile.n0 = n_tile * SUPER_N + (SHARE_A ? rank * BN : 0);
  }

  __device__ __forceinline__ bool take(Tile& tile) {
    if constexpr (KIND == 2) {
      int m_tiles;
      while (true) {
        if (expert >= problem.experts) return false;
        tile.rows = rows_of(problem, expert);
        m_tiles = (tile.rows + SUPER_M - 1) / SUPER_M;
        if (index < before + m_tiles * problem.n_tiles) break;
        before += m_tiles * problem.n_tiles;
        ++expert;
      }
      place(tile, index - before, m_tiles);
      tile.expert = expert;
      index += step;
      return true;
    } else {
      while (index < problem.m_tiles * problem.n_tiles) {
        place(tile, index, problem.m_tiles);
        index += step;
        tile.rows = problem.m;
        tile.expert = KIND == 1 ? load_int(problem.layout + tile.m0) : 0;
        if (tile.expert >= 0) return true;
      }
      return false;
    }
  }
};
