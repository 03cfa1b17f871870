// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The path for AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later).
//
// One bit-matrix product (GFNI) makes codes of planes, 128 narrow ones at a time; VNNI multiplies them with four 8-bit
// activations each. Unpacked codes of a block serve all rows of x.
#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <numeric>
#include <vector>

// what the standard library defines stays as every processor runs it
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")
#endif

#include "int8_dot.h"
#include "tile.h"

namespace {

constexpr int kVectors = 4;  // of 8 output rows: 16 sums, of the first and the last four inputs of a byte

// Bytes of a plane's 32 rows lie as 0, 16, 1, 17, ...
constexpr int place(int row) { return row < 16 ? 2 * row : 2 * (row - 16) + 1; }

// Which byte of the planes goes where so that one GFNI product gives codes: result bit i takes byte 7 - i.
struct Order {
  alignas(64) uint8_t narrow[2][64];  // up to 4 bits: each 8 bytes hold the planes of two rows
  alignas(64) uint8_t wide[4][64];    // 5 to 8 bits: of one row; an index counts from plane 0 or from plane 4
  constexpr Order() : narrow(), wide() {
    for (int half = 0; half < 2; ++half)
      for (int lane = 0; lane < 8; ++lane)
        for (int plane = 0; plane < 4; ++plane) {
          narrow[half][8 * lane + 7 - plane] = static_cast<uint8_t>(32 * plane + place(16 * half + lane));
          narrow[half][8 * lane + 3 - plane] = static_cast<uint8_t>(32 * plane + place(16 * half + 8 + lane));
        }
    for (int quarter = 0; quarter < 4; ++quarter)
      for (int lane = 0; lane < 8; ++lane)
        for (int plane = 0; plane < 8; ++plane)
          wide[quarter][8 * lane + 7 - plane] = static_cast<uint8_t>(32 * (plane % 4) + place(8 * quarter + lane));
  }
};

constexpr Order kOrder;

// The bytes of a matrix that planes [first, last) fill.
constexpr uint64_t mask_of(int first, int last, int per_row) {
  uint64_t lane = 0, mask = 0;
  for (int plane = first; plane < last; ++plane) {
    lane |= 1ull << (7 - plane);
    if (per_row == 4) lane |= 1ull << (3 - plane);
  }
  for (int i = 0; i < 8; ++i) mask |= lane << (8 * i);
  return mask;
}

// The codes of 32 rows and 8 inputs, as bytes; with up to 4 bits two rows share a byte and 2 vectors hold all.
template <int bits>
inline void matrix_product(const uint8_t* planes, __m512i* codes) {
  const __m512i inputs = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201ull));
  if (bits <= 4) {
    const __m512i low = bits == 1 ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)planes))
                                  : _mm512_loadu_si512(planes);
    const __m512i high = bits == 3   ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)(planes + 64)))
                         : bits == 4 ? _mm512_loadu_si512(planes + 64)
                                     : _mm512_setzero_si512();
    constexpr uint64_t mask = mask_of(0, bits < 4 ? bits : 4, 4);
    for (int half = 0; half < 2; ++half) {
      const __m512i index = _mm512_load_si512(kOrder.narrow[half]);
      const __m512i matrix = bits <= 2 ? _mm512_maskz_permutexvar_epi8(mask, index, low)
                                       : _mm512_maskz_permutex2var_epi8(mask, low, index, high);
      codes[half] = _mm512_gf2p8affine_epi64_epi8(inputs, matrix, 0);
    }
  } else {
    const __m512i z0 = _mm512_loadu_si512(planes), z1 = _mm512_loadu_si512(planes + 64);
    const __m512i z2 = bits == 5 ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)(planes + 128)))
                                 : _mm512_loadu_si512(planes + 128);
    const __m512i z3 = bits == 7   ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)(planes + 192)))
                       : bits == 8 ? _mm512_loadu_si512(planes + 192)
                                   : _mm512_setzero_si512();
    constexpr uint64_t first = mask_of(0, 4, 8), second = mask_of(4, bits > 4 ? bits : 5, 8);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m512i index = _mm512_load_si512(kOrder.wide[quarter]);
      const __m512i matrix = _mm512_or_si512(_mm512_maskz_permutex2var_epi8(first, z0, index, z1),
                                             _mm512_maskz_permutex2var_epi8(second, z2, index, z3));
      codes[quarter] = _mm512_gf2p8affine_epi64_epi8(inputs, matrix, 0);
    }
  }
}

// The bytes that VNNI takes, of one part: vector i holds 8 inputs of rows 8 i to 8 i + 7.
template <int bits, bool binary>
inline void part_of(const __m512i* codes, int part, __m512i* bytes) {
  if (binary) {
    const __m512i one = _mm512_set1_epi8(1);
    for (int i = 0; i < kVectors; ++i) {
      const __m512i source = bits <= 4 ? codes[i / 2] : codes[i];
      const int shift = part + (bits <= 4 && i % 2 ? 4 : 0);
      bytes[i] = _mm512_and_si512(_mm512_srli_epi16(source, shift), one);
    }
  } else if (bits <= 4) {
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    for (int half = 0; half < 2; ++half) {
      bytes[2 * half] = _mm512_and_si512(codes[half], nibble);
      bytes[2 * half + 1] = _mm512_and_si512(_mm512_srli_epi16(codes[half], 4), nibble);
    }
  } else {
    for (int i = 0; i < kVectors; ++i) bytes[i] = codes[i];
  }
}

// Adds to each of 16 sums four products of unsigned codes and signed activations. GCC 12 copies the sums round the
// intrinsic, which costs more than the products.
inline void add_products(__m512i& sums, __m512i codes, __m512i activations) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(activations));
}

inline __m512i eight_activations(const uint8_t* digits) {
  int64_t value;
  memcpy(&value, digits, 8);
  return _mm512_set1_epi64(value);
}

// Each of 8 floats twice: a row has two sums.
inline __m512 twice(const float* values) {
  const __m512i pairs = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_ps(pairs, _mm512_castps256_ps512(_mm256_loadu_ps(values)));
}

// The sums of 8 rows from their two halves.
inline __m256 fold(__m512 sums) {
  const __m512i even = _mm512_set_epi32(14, 12, 10, 8, 6, 4, 2, 0, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castps512_ps256(_mm512_add_ps(_mm512_permutexvar_ps(even, sums), _mm512_permutexvar_ps(odd, sums)));
}

template <int bits, bool binary, bool per_channel>
struct Tile : TileWork<Tile<bits, binary, per_channel>, binary ? bits : 1, per_channel, 2 * kTileRows> {
  static constexpr int parts = binary ? bits : 1;
  typedef TileWork<Tile, parts, per_channel, 2 * kTileRows> Base;
  using Base::blocks;
  using Base::chunk_first;
  using Base::coefficients;
  using Base::limbs;
  using Base::offsets;
  using Base::plan;
  using Base::product;
  using Base::sums;
  using Base::sums_of_row;

  const int64_t inputs;
  const uint8_t* planes;
  alignas(64) uint8_t bytes[kBlockBytes][parts][kVectors][64];

  Tile(const Plan& plan_, int64_t tile_)
      : Base(plan_, tile_, int8_scheme(bits, binary)),
        inputs(8 * plan_.input_bytes),
        planes(plan_.problem->planes + tile_ * plan_.input_bytes * bits * kTileRows) {}

  inline void add_block(int64_t active, int64_t b, int64_t group) {
    if (active == 1) {
      one_limb(limbs[0], b, group);
    } else {
      many_limbs(active, b, group);
    }
  }

  // What a block adds to a row's products, given the integer dot products of one limb.
  inline void add(int64_t limb, int64_t block, int part, int64_t group, const __m512i* dots) {
    const __m512 block_scale = _mm512_set1_ps(plan.block_scale[limb * blocks + block]);
    float* target = product[limb / plan.limbs - chunk_first][per_channel ? part : 0];
    for (int i = 0; i < kVectors; ++i) {
      const __m512 value = _mm512_cvtepi32_ps(dots[i]);
      const __m512 factor =
          per_channel ? block_scale
                      : _mm512_mul_ps(block_scale, twice(&coefficients[(group * parts + part) * kTileRows + 8 * i]));
      _mm512_store_ps(target + 16 * i, _mm512_fmadd_ps(value, factor, _mm512_load_ps(target + 16 * i)));
    }
  }

  inline __m512i start(int64_t limb, int64_t block) const {
    return _mm512_maskz_set1_epi32(0x5555, -int8_centre(bits, binary) * plan.block_sum[limb * blocks + block]);
  }

  // A single limb takes codes from the registers.
  inline void one_limb(int64_t limb, int64_t b, int64_t group) {
    const Block& block = plan.blocks[b];
    const uint8_t* digits = &plan.digits[limb * inputs + 8 * block.first];
    const uint8_t* source = planes + block.first * bits * kTileRows;
    __m512i dots[parts][kVectors];
    for (int v = 0; v < parts; ++v)
      for (int i = 0; i < kVectors; ++i) dots[v][i] = start(limb, b);
    for (int64_t j = 0; j < block.count; ++j) {
      const __m512i activations = eight_activations(digits + 8 * j);
      __m512i codes[4], part[kVectors];
      matrix_product<bits>(source + j * bits * kTileRows, codes);
      prefetch(source + j * bits * kTileRows, bits * kTileRows);
      for (int v = 0; v < parts; ++v) {
        part_of<bits, binary>(codes, v, part);
        for (int i = 0; i < kVectors; ++i) add_products(dots[v][i], part[i], activations);
      }
    }
    for (int v = 0; v < parts; ++v) add(limb, b, v, group, dots[v]);
  }

  // Several take the unpacked bytes, up to four at a time.
  inline void many_limbs(int64_t active, int64_t b, int64_t group) {
    const Block& block = plan.blocks[b];
    const uint8_t* source = planes + block.first * bits * kTileRows;
    for (int64_t j = 0; j < block.count; ++j) {
      __m512i codes[4], part[kVectors];
      matrix_product<bits>(source + j * bits * kTileRows, codes);
      prefetch(source + j * bits * kTileRows, bits * kTileRows);
      for (int v = 0; v < parts; ++v) {
        part_of<bits, binary>(codes, v, part);
        for (int i = 0; i < kVectors; ++i) _mm512_store_si512(bytes[j][v][i], part[i]);
      }
    }
    int64_t n = 0;
    for (; n + 4 <= active; n += 4) dots_of<4>(limbs + n, b, group);
    for (; n + 2 <= active; n += 2) dots_of<2>(limbs + n, b, group);
    if (n < active) dots_of<1>(limbs + n, b, group);
  }

  template <int count>
  inline void dots_of(const int64_t* which, int64_t b, int64_t group) {
    const Block& block = plan.blocks[b];
    const uint8_t* digits[count];
    for (int n = 0; n < count; ++n) digits[n] = &plan.digits[which[n] * inputs + 8 * block.first];
    for (int v = 0; v < parts; ++v) {
      __m512i dots[count][kVectors];
      for (int n = 0; n < count; ++n)
        for (int i = 0; i < kVectors; ++i) dots[n][i] = start(which[n], b);
      for (int64_t j = 0; j < block.count; ++j) {
        __m512i activations[count];
        for (int n = 0; n < count; ++n) activations[n] = eight_activations(digits[n] + 8 * j);
        for (int i = 0; i < kVectors; ++i) {
          const __m512i code = _mm512_load_si512(bytes[j][v][i]);
          for (int n = 0; n < count; ++n) add_products(dots[n][i], code, activations[n]);
        }
      }
      for (int n = 0; n < count; ++n) add(which[n], b, v, group, dots[n]);
    }
  }

  // `group` of the weight, which lies at `g` in coefficients and offsets.
  inline void add_offset(int64_t i, int64_t group, int64_t g) {
    const int64_t at = (chunk_first + i) * plan.problem->groups + group;
    const __m512 total = _mm512_set1_ps(plan.group_sum[at]), half_error = _mm512_set1_ps(plan.half_error[at]);
    const float *offset = &offsets[g * kTileRows], *coefficient = &coefficients[g * parts * kTileRows];
    for (int64_t k = 0; k < kTileRows; k += 16) {
      __m512 sum = _mm512_fmadd_ps(_mm512_load_ps(offset + k), total, _mm512_load_ps(&sums[i][k]));
      if (!binary) sum = _mm512_fmadd_ps(_mm512_load_ps(coefficient + k), half_error, sum);
      _mm512_store_ps(&sums[i][k], sum);
    }
  }

  inline void add_product(int64_t i) {
    for (int v = 0; v < sums_of_row; ++v)
      for (int k = 0; k < kVectors; ++k) {
        const __m256 value = fold(_mm512_load_ps(&product[i][v][16 * k]));
        const __m256 factor = per_channel ? _mm256_load_ps(&coefficients[v * kTileRows + 8 * k]) : _mm256_set1_ps(1.0f);
        float* target = &sums[i][8 * k];
        _mm256_store_ps(target, _mm256_fmadd_ps(value, factor, _mm256_load_ps(target)));
      }
  }
};

}  // namespace

peft_ext::Path peft_ext::avx512_path(int bits, bool binary) {
  return {prepare_int8, binary ? tile_of<Tile, true>(bits) : tile_of<Tile, false>(bits)};
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

#include "common.h"

peft_ext::Path peft_ext::avx512_path(int, bool) { return portable_path(); }

#endif
