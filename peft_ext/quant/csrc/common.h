// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// What the three paths share: number conversion, blocks of inputs, and the scales of a tile of 32 output rows.
//
// Everything here lies in an unnamed namespace on purpose: each path compiles its own copy for its own instructions.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <numeric>
#include <vector>

#include "packed_linear.h"

namespace peft_ext {

constexpr int64_t kTileRows = 32;   // output rows whose bytes lie together
constexpr int64_t kBlockBytes = 8;  // input bytes (64 inputs) that share a scale of the activations
constexpr int64_t kRowsAtOnce = 16;
constexpr int64_t kGroupsAtOnce = 16;
constexpr int64_t kPrefetch = 8192;  // bytes ahead; measured: 4096 and less are slower
constexpr int kLimbs = 3;  // of an exact activation: 8 bits each
constexpr float kAboveUsual = 3.0f;  // largest activation of a block over the root mean square of the middle block
constexpr int kFastLimbs = 2;  // at most, of the others: see choose_limbs

// A run of input bytes inside one group of the weight.
struct Block {
  int64_t group;
  int64_t first;  // input byte
  int64_t count;  // at most kBlockBytes
};

// How a path writes a weight: W = sum_v coefficient_v (digit_v) + offset, see `scales_of_tile`.
struct Scheme {
  int parts;           // digits that are summed up separately
  float factor[8];     // coefficient_v = scale (binary: alpha_v) * factor[v]
  float centre;        // offset = scale * (centre - zero_point); a missing zero point is 2^(bits - 1)
  float alphas;        // offset of a binary coding = alphas * sum_v alpha_v
};

// Rows of x that are worked on at once. With groups of inputs they all take the same scale.
struct Chunk {
  int64_t first, count;
};

// Work of one call that doesn't depend on the output row.
struct Plan {
  const peft_ext_problem* problem;
  int64_t input_bytes, tiles, limbs;
  std::vector<Block> blocks;
  std::vector<int64_t> first_block;  // of each group, and the end
  std::vector<int64_t> order;        // rows, those with the same scale side by side
  std::vector<Chunk> chunks;
  std::vector<float> x;              // [rows][8 * input_bytes], in that order, padded with zeros
  std::vector<float> group_sum;      // [row][group]: what the offset is multiplied with
  std::vector<float> half_error;     // [row][group]: what the first coefficient is multiplied with, besides codes
  std::vector<uint8_t> limbs_of;     // [row][block]: how many of the limbs are in use
  // [limb of a row][...]
  std::vector<uint8_t> digits;       // a path's own: 8-bit activations, or tables
  std::vector<float> block_scale;    // [block]
  std::vector<int32_t> block_sum;    // [block], of 8-bit activations
};

typedef void (*Prepare)(Plan&);
typedef void (*RunTile)(const Plan&, int64_t tile);

struct Path {
  Prepare prepare;
  RunTile run_tile;
};

Path portable_path();
Path avx2_path(int bits, bool binary);
Path avx512_path(int bits, bool binary);

}  // namespace peft_ext

namespace {

using peft_ext::Block;
using peft_ext::Chunk;
using peft_ext::Plan;
using peft_ext::Scheme;
using peft_ext::kBlockBytes;
using peft_ext::kAboveUsual;
using peft_ext::kFastLimbs;
using peft_ext::kGroupsAtOnce;
using peft_ext::kLimbs;
using peft_ext::kPrefetch;
using peft_ext::kRowsAtOnce;
using peft_ext::kTileRows;

inline float from_bfloat16(uint16_t value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_float16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  uint32_t exponent = (value >> 10) & 0x1fu, mantissa = value & 0x3ffu, bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
  } else {
    const float subnormal = static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -subnormal : subnormal;
  }
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t to_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000u) {                       // subnormal: adding 0.5 rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

// The dtypes as types, so that loops over them are compiled once for each.
struct Float32 {
  typedef float Stored;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct BFloat16 {
  typedef uint16_t Stored;
  static float load(uint16_t value) { return from_bfloat16(value); }
  static uint16_t store(float value) { return to_bfloat16(value); }
};

struct Float16 {
  typedef uint16_t Stored;
  static float load(uint16_t value) { return from_float16(value); }
  static uint16_t store(float value) { return to_float16(value); }
};

template <template <typename> class Function, typename... Arguments>
inline void with_dtype(int dtype, Arguments&&... arguments) {
  switch (dtype) {
    case PEFT_EXT_BFLOAT16: return Function<BFloat16>::run(arguments...);
    case PEFT_EXT_FLOAT16: return Function<Float16>::run(arguments...);
    default: return Function<Float32>::run(arguments...);
  }
}

template <typename T>
struct Load {
  static void run(const void* source, int64_t first, int64_t count, float* target) {
    const typename T::Stored* stored = static_cast<const typename T::Stored*>(source) + first;
    for (int64_t i = 0; i < count; ++i) target[i] = T::load(stored[i]);
  }
};

template <typename T>
struct Store {
  static void run(void* target, int64_t first, int64_t count, const float* source) {
    typename T::Stored* stored = static_cast<typename T::Stored*>(target) + first;
    for (int64_t i = 0; i < count; ++i) stored[i] = T::store(source[i]);
  }
};

// Rows of x as floats, in the plan's order, padded with zeros to whole bytes of the planes.
inline void load_activations(Plan& plan) {
  const peft_ext_problem& p = *plan.problem;
  const int64_t inputs = 8 * plan.input_bytes;
  plan.x.resize(p.rows * inputs);
  for (int64_t row = 0; row < p.rows; ++row) {
    float* target = &plan.x[row * inputs];
    with_dtype<Load>(p.x_dtype, p.x, plan.order[row] * p.x_stride, p.in_features, target);
    std::fill(target + p.in_features, target + inputs, 0.0f);
  }
}

// The magnitude of the largest of `count` floats; NaN if there is one. As integers, magnitudes are in order.
inline float largest_of(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    memcpy(&bits, values + i, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float result;
  memcpy(&result, &largest, 4);
  return result;
}

// Of a multiple of 8 floats.
inline float sum_of(const float* values, int64_t count) {
  float lanes[8] = {};
  for (int64_t i = 0; i < count; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += values[i + lane];
  return std::accumulate(lanes, lanes + 8, 0.0f);
}

// The scale that maps the largest magnitude of a block to 127.
inline float scale_for(float largest) { return largest == 0.0f ? 1.0f : std::max(largest / 127.0f, 1e-37f); }

// [32][width] to rows of 32: column c goes to out + c * stride.
inline void transpose(const float* in, int64_t width, int64_t columns, float* out, int64_t stride) {
  int64_t c = 0;
#if defined(__SSE__)
  for (; c + 4 <= columns; c += 4) {
    for (int64_t row = 0; row < kTileRows; row += 4) {
      const float* source = in + row * width + c;
      __m128 r0 = _mm_loadu_ps(source), r1 = _mm_loadu_ps(source + width);
      __m128 r2 = _mm_loadu_ps(source + 2 * width), r3 = _mm_loadu_ps(source + 3 * width);
      _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
      float* target = out + c * stride + row;
      _mm_storeu_ps(target, r0);
      _mm_storeu_ps(target + stride, r1);
      _mm_storeu_ps(target + 2 * stride, r2);
      _mm_storeu_ps(target + 3 * stride, r3);
    }
  }
#endif
  for (; c < columns; ++c)
    for (int64_t row = 0; row < kTileRows; ++row) out[c * stride + row] = in[row * width + c];
}

// The float zero points [out][groups] that go with one of the scales.
inline const float* float_zeros(const peft_ext_problem& p, int64_t which) {
  const float* zero_point = static_cast<const float*>(p.zero_point);
  return p.zero == PEFT_EXT_ZERO_CHOSEN ? zero_point + which * p.out_features * p.groups : zero_point;
}

// Makes offsets of scales [rows][count]. zero_point: of the first row, `stride` to the next.
template <typename Zero>
inline void shift_scales(const Zero* zero_point, int64_t stride, int64_t rows, int64_t count, float centre, float* scales) {
  for (int64_t row = 0; row < rows; ++row, zero_point += stride)
    for (int64_t g = 0; g < count; ++g) scales[row * count + g] *= centre - static_cast<float>(zero_point[g]);
}

// Coefficients [groups][parts][32] and offsets [groups][32] of groups [first, first + count) of a tile. Rows beyond
// the weight's get zeros.
template <typename T>
struct ScalesOfTile {
  // A batch of many adapters comes here for every row of x.
  static void one_group(const peft_ext_problem& p, const Scheme& scheme, int64_t channel, int64_t which, int64_t rows,
                        float* coefficients, float* offsets) {
    const typename T::Stored* scale = static_cast<const typename T::Stored*>(p.scale) + which * p.out_features + channel;
    float shift[kTileRows];
    std::fill(shift, shift + kTileRows, scheme.centre - static_cast<float>(1 << (p.bits - 1)));
    if (p.zero == PEFT_EXT_ZERO_BYTE) {
      const uint8_t* zero_point = static_cast<const uint8_t*>(p.zero_point) + channel;
      for (int64_t row = 0; row < rows && p.zero_point; ++row) shift[row] = scheme.centre - static_cast<float>(zero_point[row]);
    } else {
      const float* zero_point = float_zeros(p, which) + channel;
      for (int64_t row = 0; row < rows; ++row) shift[row] = scheme.centre - zero_point[row];
    }
    std::fill(offsets, offsets + kTileRows, 0.0f);
    for (int64_t row = 0; row < rows; ++row) offsets[row] = T::load(scale[row]);
    for (int v = 0; v < scheme.parts; ++v)
      for (int64_t row = 0; row < kTileRows; ++row) coefficients[v * kTileRows + row] = offsets[row] * scheme.factor[v];
    for (int64_t row = 0; row < kTileRows; ++row) offsets[row] *= shift[row];
  }

  static void run(const Plan& plan, const Scheme& scheme, int64_t tile, int64_t which, int64_t first, int64_t count,
                  float* coefficients, float* offsets) {
    const peft_ext_problem& p = *plan.problem;
    const int64_t rows = std::min(kTileRows, p.out_features - tile * kTileRows);
    const int64_t alphas = p.binary ? p.bits : 1, width = count * alphas;
    if (p.groups == 1 && !p.binary) return one_group(p, scheme, tile * kTileRows, which, rows, coefficients, offsets);
    float scales[kTileRows * kGroupsAtOnce * 8];
    if (rows < kTileRows) std::fill(scales + rows * width, scales + kTileRows * width, 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t channel = which * p.out_features + tile * kTileRows + row;
      const typename T::Stored* scale = static_cast<const typename T::Stored*>(p.scale);
      scale += (channel * p.groups + first) * alphas;
      for (int64_t i = 0; i < width; ++i) scales[row * width + i] = T::load(scale[i]);
    }
    if (p.binary) {  // parts are alphas
      transpose(scales, width, width, coefficients, kTileRows);
      for (int64_t g = 0; g < count; ++g) {
        float* coefficient = coefficients + g * alphas * kTileRows;
        float* offset = offsets + g * kTileRows;
        std::fill(offset, offset + kTileRows, 0.0f);
        for (int64_t v = 0; v < alphas; ++v)
          for (int64_t row = 0; row < kTileRows; ++row) {
            offset[row] += scheme.alphas * coefficient[v * kTileRows + row];
            coefficient[v * kTileRows + row] *= scheme.factor[v];
          }
      }
      return;
    }
    const int64_t of_group = scheme.parts * kTileRows;
    transpose(scales, width, count, coefficients, of_group);
    const float symmetric = scheme.centre - static_cast<float>(1 << (p.bits - 1));
    if (!p.zero_point) {
      for (int64_t g = 0; g < count; ++g)
        for (int64_t row = 0; row < kTileRows; ++row)
          offsets[g * kTileRows + row] = symmetric * coefficients[g * of_group + row];
    } else {
      const int64_t of_tile = tile * kTileRows * p.groups + first;
      if (p.zero == PEFT_EXT_ZERO_BYTE) {
        shift_scales(static_cast<const uint8_t*>(p.zero_point) + of_tile, p.groups, rows, count, scheme.centre, scales);
      } else {
        shift_scales(float_zeros(p, which) + of_tile, p.groups, rows, count, scheme.centre, scales);
      }
      transpose(scales, width, count, offsets, kTileRows);
    }
    for (int64_t g = 0; g < count; ++g)
      for (int v = scheme.parts - 1; v >= 0; --v)
        for (int64_t row = 0; row < kTileRows; ++row)
          coefficients[g * of_group + v * kTileRows + row] = coefficients[g * of_group + row] * scheme.factor[v];
  }
};

inline void scales_of_tile(const Plan& plan, const Scheme& scheme, int64_t tile, int64_t which, int64_t first,
                           int64_t count, float* coefficients, float* offsets) {
  with_dtype<ScalesOfTile>(plan.problem->scale_dtype, plan, scheme, tile, which, first, count, coefficients, offsets);
}

// How many limbs each block of activations takes. A single one has 8 bits, which is enough where numbers are of a
// size: language models, however, have inputs that are a hundred times larger than the rest, and a scale that fits those
// leaves few levels for the others, which may decide the result. Blocks with such an input take a second limb.
inline void choose_limbs(Plan& plan) {
  const int64_t rows = plan.problem->rows, blocks = plan.blocks.size(), inputs = 8 * plan.input_bytes;
  plan.limbs_of.assign(rows * blocks, static_cast<uint8_t>(plan.limbs));
  if (plan.problem->exact) return;
  std::vector<float> mean_square(blocks);
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = &plan.x[row * inputs];
    for (int64_t b = 0; b < blocks; ++b) {
      const float* values = x + 8 * plan.blocks[b].first;
      const int64_t count = 8 * plan.blocks[b].count;
      float lanes[8] = {};
      for (int64_t k = 0; k < count; k += 8)
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += values[k + lane] * values[k + lane];
      mean_square[b] = std::accumulate(lanes, lanes + 8, 0.0f) / static_cast<float>(count);
    }
    std::nth_element(mean_square.begin(), mean_square.begin() + blocks / 2, mean_square.end());
    const float most = kAboveUsual * sqrtf(mean_square[blocks / 2]);
    if (!(most < INFINITY)) continue;  // squares left the range of floats, and tell nothing
    for (int64_t b = 0; b < blocks; ++b)
      if (largest_of(x + 8 * plan.blocks[b].first, 8 * plan.blocks[b].count) <= most) plan.limbs_of[row * blocks + b] = 1;
  }
}

// The limbs of a chunk that a block has, as indices of `digits`; returns how many.
inline int64_t limbs_of_block(const Plan& plan, const Chunk& chunk, int64_t block, int64_t* limbs) {
  const int64_t blocks = plan.blocks.size();
  int64_t count = 0;
  for (int64_t row = chunk.first; row < chunk.first + chunk.count; ++row)
    for (int64_t limb = 0; limb < plan.limbs_of[row * blocks + block]; ++limb) limbs[count++] = row * plan.limbs + limb;
  return count;
}

// Adds the bias and writes a chunk's part of a tile of y. sums: [row][32].
inline void write_tile(const Plan& plan, const Chunk& chunk, int64_t tile, float* sums) {
  const peft_ext_problem& p = *plan.problem;
  const int64_t first = tile * kTileRows, columns = std::min(kTileRows, p.out_features - first);
  float bias[kTileRows] = {};
  if (p.bias) with_dtype<Load>(p.bias_dtype, p.bias, first, columns, bias);
  for (int64_t i = 0; i < chunk.count; ++i) {
    float* sum = sums + i * kTileRows;
    for (int64_t column = 0; column < kTileRows; ++column) sum[column] += bias[column];
    with_dtype<Store>(p.x_dtype, p.y, plan.order[chunk.first + i] * p.out_features + first, columns, sum);
  }
}

// Planes that are due in a moment: the processor's own prefetching stops at the end of every page. An address beyond
// the planes does no harm.
inline void prefetch(const uint8_t* planes, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(planes + kPrefetch + at);
#endif
}

inline int64_t choice_of(const Plan& plan, int64_t row) {
  const int64_t* choice = plan.problem->choice;
  return choice ? choice[plan.order[row]] : 0;
}

}  // namespace
