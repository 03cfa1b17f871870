// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The scheme of the portable and the AVX-512 path: activations rounded to 8 bits in blocks of 64 inputs, codes unpacked
// to bytes, dot products in integers.
#pragma once

#include "common.h"

namespace {

// Uniform codes are one part; each plane of a binary coding is a part of bits 0 and 1, since B = 2 bit - 1.
inline Scheme int8_scheme(int bits, bool binary) {
  Scheme scheme = {};
  scheme.parts = binary ? bits : 1;
  for (int v = 0; v < scheme.parts; ++v) scheme.factor[v] = binary ? 2.0f : 1.0f;
  scheme.centre = binary ? 0.0f : static_cast<float>(1 << (bits - 1));
  scheme.alphas = -1.0f;
  return scheme;
}

// Subtracted from codes as integers, so that the float sums stay small.
inline int32_t int8_centre(int bits, bool binary) { return binary ? 0 : 1 << (bits - 1); }

inline void prepare_int8(Plan& plan) {
  const peft_ext_problem& p = *plan.problem;
  load_activations(plan);
  choose_limbs(plan);
  const int64_t inputs = 8 * plan.input_bytes, blocks = plan.blocks.size();
  plan.digits.resize(p.rows * plan.limbs * inputs);
  plan.block_scale.resize(p.rows * plan.limbs * blocks);
  plan.block_sum.resize(p.rows * plan.limbs * blocks);
  plan.group_sum.assign(p.rows * p.groups, 0.0f);
  plan.half_error.assign(p.rows * p.groups, 0.0f);
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no place for fractions
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t b = 0; b < blocks; ++b) {
      const Block& block = plan.blocks[b];
      const int64_t count = 8 * block.count;
      float* rest = &plan.x[row * inputs + 8 * block.first];
      float scale = scale_for(largest_of(rest, count));
      const int64_t at_group = row * p.groups + block.group;
      const float exact = sum_of(rest, count);
      float rounded_sum = 0.0f;
      for (int64_t limb = 0; limb < plan.limbs_of[row * blocks + b]; ++limb, scale /= 254.0f) {
        const int64_t at = row * plan.limbs + limb;
        int8_t* digits = reinterpret_cast<int8_t*>(&plan.digits[at * inputs + 8 * block.first]);
        const float inverse = 1.0f / scale;
        int32_t sum = 0;
        for (int64_t k = 0; k < count; ++k) {
          float rounded = (rest[k] * inverse + round) - round;
          rounded = rounded > -127.0f ? rounded : -127.0f;  // also of NaN, which comes back with the scale
          rounded = rounded < 127.0f ? rounded : 127.0f;
          digits[k] = static_cast<int8_t>(rounded);
          sum += static_cast<int32_t>(rounded);
          rest[k] -= rounded * scale;
        }
        plan.block_scale[at * blocks + b] = scale;
        plan.block_sum[at * blocks + b] = sum;
        rounded_sum += scale * static_cast<float>(sum);
      }
      // Rounding errors of x cancel where weights are as often above as below zero: codes less (2^bits - 1) / 2, or signs.
      // What a zero point adds to those takes the sum of x itself.
      plan.group_sum[at_group] += p.binary ? rounded_sum : exact;
      if (!p.binary) plan.half_error[at_group] += 0.5f * (rounded_sum - exact);
    }
  }
}

}  // namespace
