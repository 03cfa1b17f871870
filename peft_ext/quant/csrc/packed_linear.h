// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The C interface of the CPU kernel: y = x W^T + bias with W in bit-planes, for few rows of x.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Counts up whenever this file or the arguments in module.cpp change; the Python side refuses a kernel of another version.
#define PEFT_EXT_KERNEL_VERSION 4

enum peft_ext_dtype { PEFT_EXT_FLOAT32 = 0, PEFT_EXT_BFLOAT16 = 1, PEFT_EXT_FLOAT16 = 2 };

// What zero points are: bytes, floats, or floats that go with the scale that a row takes.
enum peft_ext_zero { PEFT_EXT_ZERO_BYTE = 0, PEFT_EXT_ZERO_FLOAT = 1, PEFT_EXT_ZERO_CHOSEN = 2 };

// What the instructions of a path need; a processor with one has those before it.
enum peft_ext_level { PEFT_EXT_PORTABLE = 0, PEFT_EXT_AVX2 = 1, PEFT_EXT_AVX512 = 2 };

typedef struct {
  // Activations and result: `rows` x in_features and `rows` x out_features, the last dimension contiguous.
  const void* x;
  void* y;
  int32_t x_dtype;  // of x, y and nothing else
  int64_t rows;
  int64_t x_stride;  // elements between rows of x; those of y are adjacent

  // The weight: uint8 [ceil(out / 32)][ceil(in / 8)][bits][32], see packing.py.
  const uint8_t* planes;
  int32_t bits;    // 1 to 8
  int32_t binary;  // 1: W = sum_p scale_p B_p; 0: W = scale (code - zero_point)
  int64_t out_features;
  int64_t in_features;

  // [n][out][groups], binary [n][out][groups][bits]; groups divide in_features, group sizes are multiples of 8 where
  // there is more than one.
  const void* scale;
  int32_t scale_dtype;
  int64_t groups;
  const int64_t* choice;       // which of the n scales each row takes; NULL: the first
  const void* zero_point;      // [out][groups] or [n][out][groups]; NULL: all 2^(bits - 1), or a binary coding
  int32_t zero;                // peft_ext_zero: uint8, float, or [n][out][groups] of float
  const void* bias;            // [out] or NULL
  int32_t bias_dtype;

  int32_t exact;    // 0: activations rounded to 8 bits in blocks of 64; 1: to 24 bits
  int32_t threads;  // at most
  int32_t level;    // peft_ext_level, at most peft_ext_best_level()
} peft_ext_problem;

// The highest level that this processor and its operating system run.
int peft_ext_best_level(void);

enum peft_ext_failure { PEFT_EXT_NO_MEMORY = 1, PEFT_EXT_LEFT_RANGE = 2 };

// 0; PEFT_EXT_NO_MEMORY; or PEFT_EXT_LEFT_RANGE when y isn't finite: an input wasn't, or a number left the range of floats
// on the way, and y is to be computed by other means. Nothing else can fail for a problem as described above.
int peft_ext_packed_linear(const peft_ext_problem* problem);

#ifdef __cplusplus
}
#endif
