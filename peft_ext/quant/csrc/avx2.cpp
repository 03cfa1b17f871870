// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The path for AVX2: no unpacking, but look-ups (the idea of T-MAC and LUT-GEMM).
//
// For every four activations a table holds all 16 signed sums in 8 bits; four bits of a plane are an index, and one
// shuffle looks up 32 output rows.
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <numeric>
#include <vector>

// what the standard library defines stays as every processor runs it
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "tile.h"

namespace {

constexpr int kTable = 16;
constexpr int kVectors = 4;  // of 8 output rows

constexpr int kPlanesOfPart = 4;  // whose 16-bit sums, times 1, 2, 4 and 8, stay within 16 bits

constexpr int parts_of(int bits, bool binary) {
  return binary ? bits : (bits + kPlanesOfPart - 1) / kPlanesOfPart;
}

// Uniform codes are signed planes, 2^p / 2 times the scale each, and an offset; four planes make a part.
inline Scheme table_scheme(int bits, bool binary) {
  Scheme scheme = {};
  scheme.parts = parts_of(bits, binary);
  for (int v = 0; v < scheme.parts; ++v) scheme.factor[v] = binary ? 1.0f : 0.5f * static_cast<float>(1 << (kPlanesOfPart * v));
  scheme.centre = 0.5f * static_cast<float>((1 << bits) - 1);
  scheme.alphas = 0.0f;
  return scheme;
}

// Tables of unsigned bytes, 128 more than the signed sum over the block's scale.
void prepare_tables(Plan& plan) {
  const peft_ext_problem& p = *plan.problem;
  load_activations(plan);
  choose_limbs(plan);
  const int64_t inputs = 8 * plan.input_bytes, blocks = plan.blocks.size(), of_row = inputs / 4 * kTable;
  plan.digits.resize(p.rows * plan.limbs * of_row);
  plan.block_scale.resize(p.rows * plan.limbs * blocks);
  plan.group_sum.assign(p.rows * p.groups, 0.0f);
  __m256 signs[4][2];
  for (int k = 0; k < 4; ++k)
    for (int half = 0; half < 2; ++half) {
      alignas(32) float sign[8];
      for (int i = 0; i < 8; ++i) sign[i] = ((8 * half + i) >> k) & 1 ? 1.0f : -1.0f;
      signs[k][half] = _mm256_load_ps(sign);
    }
  const __m256 low = _mm256_set1_ps(-127.0f), high = _mm256_set1_ps(127.0f);
  const __m256i in_order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t b = 0; b < blocks; ++b) {
      const Block& block = plan.blocks[b];
      const float* x = &plan.x[row * inputs + 8 * block.first];
      float largest = 0.0f;
      for (int64_t k = 0; k < 8 * block.count; k += 4) {
        const float sum = fabsf(x[k]) + fabsf(x[k + 1]) + fabsf(x[k + 2]) + fabsf(x[k + 3]);
        largest = sum > largest || sum != sum ? sum : largest;  // NaN stays
      }
      plan.group_sum[row * p.groups + block.group] += sum_of(x, 8 * block.count);
      const int64_t limbs = plan.limbs_of[row * blocks + b];
      float scales[kLimbs] = {scale_for(largest)};
      for (int limb = 1; limb < kLimbs; ++limb) scales[limb] = scales[limb - 1] / 254.0f;
      for (int64_t limb = 0; limb < limbs; ++limb) plan.block_scale[(row * plan.limbs + limb) * blocks + b] = scales[limb];
      for (int64_t k = 0; k < 8 * block.count; k += 4) {
        __m256 rest[2];
        for (int half = 0; half < 2; ++half) {
          rest[half] = _mm256_mul_ps(_mm256_set1_ps(x[k]), signs[0][half]);
          for (int i = 1; i < 4; ++i) rest[half] = _mm256_fmadd_ps(_mm256_set1_ps(x[k + i]), signs[i][half], rest[half]);
        }
        for (int64_t limb = 0; limb < limbs; ++limb) {
          const int64_t at = row * plan.limbs + limb;
          const __m256 inverse = _mm256_set1_ps(1.0f / scales[limb]), back = _mm256_set1_ps(-scales[limb]);
          __m256i digits[2];
          for (int half = 0; half < 2; ++half) {
            __m256 digit = _mm256_round_ps(_mm256_mul_ps(rest[half], inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            digit = _mm256_max_ps(low, _mm256_min_ps(high, digit));  // a NaN comes back with the scale
            rest[half] = _mm256_fmadd_ps(digit, back, rest[half]);
            digits[half] = _mm256_add_epi32(_mm256_cvtps_epi32(digit), _mm256_set1_epi32(128));
          }
          const __m256i words = _mm256_packus_epi32(digits[0], digits[1]);
          const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), in_order);
          _mm_storeu_si128((__m128i*)&plan.digits[at * of_row + (8 * block.first + k) / 4 * kTable], _mm256_castsi256_si128(bytes));
        }
      }
    }
  }
}

template <int bits, bool binary, bool per_channel>
struct Tile : TileWork<Tile<bits, binary, per_channel>, parts_of(bits, binary), per_channel, kTileRows> {
  static constexpr int parts = parts_of(bits, binary);
  typedef TileWork<Tile, parts, per_channel, kTileRows> Base;
  using Base::blocks;
  using Base::chunk_first;
  using Base::coefficients;
  using Base::limbs;
  using Base::offsets;
  using Base::plan;
  using Base::product;
  using Base::sums;
  using Base::sums_of_row;

  const int64_t table_bytes;
  const uint8_t* planes;

  Tile(const Plan& plan_, int64_t tile_)
      : Base(plan_, tile_, table_scheme(bits, binary)),
        table_bytes(2 * plan_.input_bytes * kTable),
        planes(plan_.problem->planes + tile_ * plan_.input_bytes * bits * kTileRows) {}

  inline void add_block(int64_t active, int64_t b, int64_t group) {
    for (int64_t n = 0; n < active; ++n) {
      look_up<0, (bits < kPlanesOfPart ? bits : kPlanesOfPart)>(limbs[n], b, group);
      if constexpr (bits > kPlanesOfPart) look_up<kPlanesOfPart, bits - kPlanesOfPart>(limbs[n], b, group);
    }
  }

  // Looks up planes [first, first + count) of a block and adds a limb's sums: a part of up to four planes of uniform
  // codes, or as many parts of a binary coding.
  template <int first, int count>
  inline void look_up(int64_t limb, int64_t b, int64_t group) {
    const Block& block = plan.blocks[b];
    const uint8_t* tables = &plan.digits[limb * table_bytes + 2 * block.first * kTable];
    const uint8_t* source = planes + (block.first * bits + first) * kTileRows;
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    // bytes 2 i (rows 0 to 15) and 2 i + 1 (rows 16 to 31) are added up in 16 bits: `odd` the latter, `all` both,
    // those times 256, of which only what wraps round is lost
    __m256i all[count], odd[count];
    for (int p = 0; p < count; ++p) all[p] = odd[p] = _mm256_setzero_si256();
    for (int64_t j = 0; j < block.count; ++j) {
      const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(tables + 2 * j * kTable)));
      const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(tables + (2 * j + 1) * kTable)));
      prefetch(source + j * bits * kTileRows, count * kTileRows);
      for (int p = 0; p < count; ++p) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(source + (j * bits + p) * kTileRows));
        const __m256i one = _mm256_shuffle_epi8(low, _mm256_and_si256(bytes, nibble));
        const __m256i other = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
        all[p] = _mm256_add_epi16(all[p], _mm256_add_epi16(one, other));
        odd[p] = _mm256_add_epi16(odd[p], _mm256_add_epi16(_mm256_srli_epi16(one, 8), _mm256_srli_epi16(other, 8)));
      }
    }
    const __m256i bias = _mm256_set1_epi16(static_cast<short>(256 * block.count));  // 128 of each look-up
    __m256i total[2];
    for (int p = 0; p < count; ++p) {
      const __m256i sum[2] = {_mm256_sub_epi16(_mm256_sub_epi16(all[p], _mm256_slli_epi16(odd[p], 8)), bias),
                              _mm256_sub_epi16(odd[p], bias)};
      if (binary) {
        add(limb, b, first + p, group, sum);
      } else {
        for (int half = 0; half < 2; ++half) {
          const __m256i weighted = _mm256_slli_epi16(sum[half], p);
          total[half] = p ? _mm256_add_epi16(total[half], weighted) : weighted;
        }
      }
    }
    if (!binary) add(limb, b, first / kPlanesOfPart, group, total);
  }

  // What a block adds to a row's products. sum: of rows 0 to 15, and of rows 16 to 31.
  inline void add(int64_t limb, int64_t b, int part, int64_t group, const __m256i* sum) {
    const __m256 block_scale = _mm256_set1_ps(plan.block_scale[limb * blocks + b]);
    float* target = product[limb / plan.limbs - chunk_first][per_channel ? part : 0];
    for (int i = 0; i < kVectors; ++i) {
      const __m128i half = i % 2 ? _mm256_extracti128_si256(sum[i / 2], 1) : _mm256_castsi256_si128(sum[i / 2]);
      const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
      const __m256 factor =
          per_channel ? block_scale
                      : _mm256_mul_ps(block_scale, _mm256_load_ps(&coefficients[(group * parts + part) * kTileRows + 8 * i]));
      _mm256_store_ps(target + 8 * i, _mm256_fmadd_ps(value, factor, _mm256_load_ps(target + 8 * i)));
    }
  }

  // `group` of the weight, which lies at `g` in offsets.
  inline void add_offset(int64_t i, int64_t group, int64_t g) {
    const float* offset = &offsets[g * kTileRows];
    const __m256 total = _mm256_set1_ps(plan.group_sum[(chunk_first + i) * plan.problem->groups + group]);
    for (float *target = sums[i], *end = target + kTileRows; target < end; target += 8, offset += 8)
      _mm256_store_ps(target, _mm256_fmadd_ps(_mm256_load_ps(offset), total, _mm256_load_ps(target)));
  }

  inline void add_product(int64_t i) {
    for (int v = 0; v < sums_of_row; ++v)
      for (int64_t k = 0; k < kTileRows; k += 8) {
        const __m256 factor = per_channel ? _mm256_load_ps(&coefficients[v * kTileRows + k]) : _mm256_set1_ps(1.0f);
        const __m256 value = _mm256_load_ps(&product[i][v][k]);
        _mm256_store_ps(&sums[i][k], _mm256_fmadd_ps(value, factor, _mm256_load_ps(&sums[i][k])));
      }
  }
};

}  // namespace

peft_ext::Path peft_ext::avx2_path(int bits, bool binary) {
  return {prepare_tables, binary ? tile_of<Tile, true>(bits) : tile_of<Tile, false>(bits)};
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

#include "common.h"

peft_ext::Path peft_ext::avx2_path(int, bool) { return portable_path(); }

#endif
