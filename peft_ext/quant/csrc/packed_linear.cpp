// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// Chooses a path by what the processor can do, plans a call, and shares its tiles among threads.
#include "packed_linear.h"

#include <atomic>
#include <limits>
#include <new>
#include <numeric>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "common.h"

namespace {

using peft_ext::Path;
using peft_ext::RunTile;

// Below this many weight bytes times rows, waking a thread takes longer than the work: on two cores of an EPYC, weights out of
// the caches, 1 thread against 2 took 13 against 17 us for 0.4 MB, 29 against 29 for 1 MB, 56 against 45 for 2 MB.
constexpr int64_t kWorthSharing = 1 << 20;

Path path_of(int level, int bits, bool binary) {
  if (level >= PEFT_EXT_AVX512) return peft_ext::avx512_path(bits, binary);
  if (level >= PEFT_EXT_AVX2) return peft_ext::avx2_path(bits, binary);
  return peft_ext::portable_path();
}

void plan_blocks(Plan& plan) {
  const int64_t groups = plan.problem->groups, of_group = plan.input_bytes / groups;
  plan.blocks.clear();
  plan.first_block.clear();
  for (int64_t group = 0; group < groups; ++group) {
    plan.first_block.push_back(plan.blocks.size());
    for (int64_t done = 0; done < of_group; done += kBlockBytes)
      plan.blocks.push_back({group, group * of_group + done, std::min(kBlockBytes, of_group - done)});
  }
  plan.first_block.push_back(plan.blocks.size());
}

// Rows in chunks; with groups of inputs, the rows of a chunk take the same scale.
void plan_rows(Plan& plan) {
  const peft_ext_problem& p = *plan.problem;
  plan.order.resize(p.rows);
  std::iota(plan.order.begin(), plan.order.end(), int64_t{0});
  const bool apart = p.choice && p.groups > 1;
  if (p.choice) {
    std::stable_sort(plan.order.begin(), plan.order.end(),
                     [&p](int64_t one, int64_t other) { return p.choice[one] < p.choice[other]; });
  }
  plan.chunks.clear();
  for (int64_t row = 0; row < p.rows;) {
    int64_t end = std::min(p.rows, row + kRowsAtOnce);
    while (apart && p.choice[plan.order[end - 1]] != p.choice[plan.order[row]]) --end;
    plan.chunks.push_back({row, end - row});
    row = end;
  }
}

struct Shared {
  const Plan* plan;
  RunTile run_tile;
  std::atomic<int64_t> next;
  int64_t step;
};

void work(void* data) {
  Shared& shared = *static_cast<Shared*>(data);
  const int64_t tiles = shared.plan->tiles;
  for (;;) {
    const int64_t first = shared.next.fetch_add(shared.step);
    if (first >= tiles) return;
    for (int64_t tile = first; tile < std::min(tiles, first + shared.step); ++tile) shared.run_tile(*shared.plan, tile);
  }
}

// Whether the result has neither infinities nor NaN: no exponent with all bits set. (Within the tiles this took 2 us of
// a product of 14 us, here it takes 0.2.)
template <typename Bits>
bool below(const void* values, int64_t count, Bits infinity) {
  const Bits* bits = static_cast<const Bits*>(values);
  const Bits magnitude = std::numeric_limits<Bits>::max();  // all bits but the sign's
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max<Bits>(largest, bits[i] & magnitude);
  return largest < infinity;
}

bool is_finite(const peft_ext_problem& p) {
  const int64_t count = p.rows * p.out_features;
  if (p.x_dtype == PEFT_EXT_FLOAT32) return below<int32_t>(p.y, count, 0x7f800000);
  return below<int16_t>(p.y, count, p.x_dtype == PEFT_EXT_BFLOAT16 ? 0x7f80 : 0x7c00);
}

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// The thread pool of the OpenMP that torch has loaded: a second pool would fight with it for the cores.
Parallel openmp() {
#if defined(__linux__)
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return parallel;
#else
  return nullptr;
#endif
}

}  // namespace

extern "C" int peft_ext_best_level(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PEFT_EXT_PORTABLE;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("gfni");
  return avx512 ? PEFT_EXT_AVX512 : PEFT_EXT_AVX2;
#else
  return PEFT_EXT_PORTABLE;
#endif
}

extern "C" int peft_ext_packed_linear(const peft_ext_problem* problem) {
  const peft_ext_problem& p = *problem;
  if (p.rows <= 0 || p.out_features <= 0 || p.in_features <= 0) return 0;
  try {
    static thread_local Plan plan;  // keeps its memory between calls
    plan.problem = problem;
    plan.input_bytes = (p.in_features + 7) / 8;
    plan.tiles = (p.out_features + kTileRows - 1) / kTileRows;
    plan.limbs = p.exact ? kLimbs : kFastLimbs;
    plan_blocks(plan);
    plan_rows(plan);
    const Path path = path_of(p.level, p.bits, p.binary);
    path.prepare(plan);
    const int64_t amount = plan.tiles * kTileRows * plan.input_bytes * p.bits * p.rows * plan.limbs;
    const int64_t threads = amount < kWorthSharing ? 1 : std::min<int64_t>(p.threads, plan.tiles);
    Shared shared = {&plan, path.run_tile, {0}, std::max<int64_t>(1, plan.tiles / (std::max<int64_t>(threads, 1) * 8))};
    const Parallel parallel = openmp();
    if (threads > 1 && parallel) {
      parallel(work, &shared, static_cast<unsigned>(threads), 0);
    } else {
      work(&shared);
    }
    return is_finite(p) ? 0 : PEFT_EXT_LEFT_RANGE;
  } catch (const std::bad_alloc&) {
    return PEFT_EXT_NO_MEMORY;
  }
}
