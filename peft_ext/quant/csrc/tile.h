// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// What the vector paths do with a tile, whatever their instructions: the walk over chunks, groups and blocks.
#pragma once

#include "common.h"

namespace {

// A path's Tile<bits, binary, per_channel> derives from this and says how a block is multiplied (`add_block`), and how
// offsets (`add_offset`) and finished products (`add_product`) join the sums of a row. `width`: floats of a row's product.
template <class Self, int parts, bool per_channel, int64_t width>
struct TileWork {
  static constexpr int sums_of_row = per_channel ? parts : 1;  // with groups, parts are added up at once

  const Plan& plan;
  const int64_t tile, blocks;
  const Scheme scheme;
  int64_t chunk_first = 0;
  int64_t limbs[kRowsAtOnce * kLimbs];
  alignas(64) float coefficients[kGroupsAtOnce * parts * kTileRows];
  alignas(64) float offsets[kGroupsAtOnce * kTileRows];
  alignas(64) float sums[kRowsAtOnce][kTileRows];
  alignas(64) float product[kRowsAtOnce][sums_of_row][width];

  TileWork(const Plan& plan_, int64_t tile_, const Scheme& scheme_)
      : plan(plan_), tile(tile_), blocks(static_cast<int64_t>(plan_.blocks.size())), scheme(scheme_) {}

  void run(const Chunk& chunk) {
    Self& self = static_cast<Self&>(*this);
    const int64_t groups = plan.problem->groups;
    chunk_first = chunk.first;
    memset(product, 0, chunk.count * sizeof(product[0]));
    memset(sums, 0, chunk.count * sizeof(sums[0]));
    for (int64_t first = 0; first < groups; first += kGroupsAtOnce) {
      const int64_t count = std::min(kGroupsAtOnce, groups - first);
      if (!per_channel)
        scales_of_tile(plan, scheme, tile, choice_of(plan, chunk.first), first, count, coefficients, offsets);
      for (int64_t g = 0; g < count; ++g) {
        for (int64_t b = plan.first_block[first + g]; b < plan.first_block[first + g + 1]; ++b)
          self.add_block(limbs_of_block(plan, chunk, b, limbs), b, g);
        for (int64_t i = 0; i < chunk.count && !per_channel; ++i) self.add_offset(i, first + g, g);
      }
    }
    int64_t known = -1;
    for (int64_t i = 0; i < chunk.count; ++i) {
      const int64_t which = choice_of(plan, chunk.first + i);
      if (per_channel && which != known) scales_of_tile(plan, scheme, tile, which, 0, 1, coefficients, offsets);
      known = which;
      if (per_channel) self.add_offset(i, 0, 0);
      self.add_product(i);
    }
    write_tile(plan, chunk, tile, &sums[0][0]);
  }
};

template <template <int, bool, bool> class Tile, int bits, bool binary>
void run_tile(const Plan& plan, int64_t tile) {
  if (plan.problem->groups == 1) {
    Tile<bits, binary, true> work(plan, tile);
    for (const Chunk& chunk : plan.chunks) work.run(chunk);
  } else {
    Tile<bits, binary, false> work(plan, tile);
    for (const Chunk& chunk : plan.chunks) work.run(chunk);
  }
}

template <template <int, bool, bool> class Tile, bool binary>
peft_ext::RunTile tile_of(int bits) {
  constexpr peft_ext::RunTile of[] = {run_tile<Tile, 1, binary>, run_tile<Tile, 2, binary>, run_tile<Tile, 3, binary>,
                                      run_tile<Tile, 4, binary>, run_tile<Tile, 5, binary>, run_tile<Tile, 6, binary>,
                                      run_tile<Tile, 7, binary>, run_tile<Tile, 8, binary>};
  return of[bits - 1];
}

}  // namespace
