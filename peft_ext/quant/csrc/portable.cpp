// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The path that any processor runs.
#include "int8_dot.h"

namespace {

// Bit i of a byte as the lowest bit of byte i.
struct SpreadTable {
  uint64_t of[256];
  SpreadTable() {
    for (int value = 0; value < 256; ++value) {
      uint8_t bytes[8];
      for (int i = 0; i < 8; ++i) bytes[i] = (value >> i) & 1;
      memcpy(&of[value], bytes, 8);
    }
  }
};

const SpreadTable spread;

// Where a plane keeps an output row's byte.
inline int64_t place(int64_t row) { return row < 16 ? 2 * row : 2 * (row - 16) + 1; }

void run_tile(const Plan& plan, int64_t tile) {
  const peft_ext_problem& p = *plan.problem;
  const int bits = p.bits;
  const Scheme scheme = int8_scheme(bits, p.binary);
  const int parts = scheme.parts;
  const int32_t centre = int8_centre(bits, p.binary);
  const int64_t blocks = plan.blocks.size(), inputs = 8 * plan.input_bytes;
  const uint8_t* planes = p.planes + tile * plan.input_bytes * bits * kTileRows;
  const bool per_channel = p.groups == 1;
  std::vector<float> coefficients(kGroupsAtOnce * parts * kTileRows), offsets(kGroupsAtOnce * kTileRows);
  int64_t limbs[kRowsAtOnce * kLimbs];
  uint64_t codes[8][kBlockBytes];  // [part][input byte]: 8 codes each

  for (const Chunk& chunk : plan.chunks) {
    float sums[kRowsAtOnce][kTileRows] = {};
    float product[kRowsAtOnce][8][kTileRows] = {};  // per channel only: of each part, without its coefficient
    for (int64_t first = 0; first < p.groups; first += kGroupsAtOnce) {
      const int64_t count = std::min(kGroupsAtOnce, p.groups - first);
      if (!per_channel) {
        const int64_t which = choice_of(plan, chunk.first);
        scales_of_tile(plan, scheme, tile, which, first, count, coefficients.data(), offsets.data());
      }
      for (int64_t g = 0; g < count; ++g) {
        for (int64_t b = plan.first_block[first + g]; b < plan.first_block[first + g + 1]; ++b) {
          const Block& block = plan.blocks[b];
          const int64_t active = limbs_of_block(plan, chunk, b, limbs);
          for (int64_t row = 0; row < kTileRows; ++row) {
            for (int64_t j = 0; j < block.count; ++j) {
              const uint8_t* bytes = planes + (block.first + j) * bits * kTileRows + place(row);
              if (!p.binary) codes[0][j] = 0;
              for (int plane = 0; plane < bits; ++plane) {
                const uint64_t plane_bits = spread.of[bytes[plane * kTileRows]];
                if (p.binary) {
                  codes[plane][j] = plane_bits;
                } else {
                  codes[0][j] |= plane_bits << plane;
                }
              }
            }
            for (int64_t n = 0; n < active; ++n) {
              const int64_t at = limbs[n], i = at / plan.limbs - chunk.first;
              const int8_t* digits = reinterpret_cast<const int8_t*>(&plan.digits[at * inputs + 8 * block.first]);
              const float block_scale = plan.block_scale[at * blocks + b];
              for (int v = 0; v < parts; ++v) {
                const uint8_t* code = reinterpret_cast<const uint8_t*>(codes[v]);
                int32_t dot = -centre * plan.block_sum[at * blocks + b];
                for (int64_t k = 0; k < 8 * block.count; ++k) dot += static_cast<int32_t>(code[k]) * digits[k];
                const float value = block_scale * static_cast<float>(dot);
                if (per_channel) {
                  product[i][v][row] += value;
                } else {
                  sums[i][row] += value * coefficients[(g * parts + v) * kTileRows + row];
                }
              }
            }
          }
        }
        for (int64_t i = 0; i < chunk.count && !per_channel; ++i) {
          const int64_t at = (chunk.first + i) * p.groups + first + g;
          for (int64_t row = 0; row < kTileRows; ++row)
            sums[i][row] += offsets[g * kTileRows + row] * plan.group_sum[at] +
                            coefficients[g * parts * kTileRows + row] * plan.half_error[at];
        }
      }
    }
    int64_t known = -1;
    for (int64_t i = 0; i < chunk.count && per_channel; ++i) {
      const int64_t which = choice_of(plan, chunk.first + i);
      if (which != known) scales_of_tile(plan, scheme, tile, which, 0, 1, coefficients.data(), offsets.data());
      known = which;
      for (int64_t row = 0; row < kTileRows; ++row) {
        sums[i][row] = offsets[row] * plan.group_sum[chunk.first + i] +
                       coefficients[row] * plan.half_error[chunk.first + i];
        for (int v = 0; v < parts; ++v) sums[i][row] += coefficients[v * kTileRows + row] * product[i][v][row];
      }
    }
    write_tile(plan, chunk, tile, &sums[0][0]);
  }
}

}  // namespace

peft_ext::Path peft_ext::portable_path() { return {prepare_int8, run_tile}; }
