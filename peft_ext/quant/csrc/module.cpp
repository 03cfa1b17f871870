// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The Python module `peft_ext.quant._kernel`: addresses and sizes in, nothing of torch's. Whatever the sizes are, nothing is
// read or divided by before they have been found to fit each other and what there is at the addresses.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <initializer_list>
#include <limits>

#include "packed_linear.h"

namespace {

constexpr int kArguments = 29;
constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kTileRows = 32;

// How many numbers there are at the addresses.
struct Counts {
  int64_t x, y, planes, scale, choice, zero_point, bias;
};

// At most kMost; factors aren't negative.
int64_t times(int64_t one, int64_t other) { return other && one > kMost / other ? kMost : one * other; }

bool is_dtype(int32_t dtype) { return dtype >= PEFT_EXT_FLOAT32 && dtype <= PEFT_EXT_FLOAT16; }

// What of a problem isn't as packed_linear.h describes it; NULL if all of it is.
const char* misfit(const peft_ext_problem& p, const Counts& counts) {
  if (!p.x || !p.y || !p.planes || !p.scale) return "an address is null";
  if (p.rows < 1 || p.out_features < 1 || p.in_features < 1) return "rows, out_features and in_features have to be positive";
  if (p.x_stride < 0) return "x_stride is negative";
  if (p.bits < 1 || p.bits > 8) return "bits have to be from 1 to 8";
  if (!is_dtype(p.x_dtype) || !is_dtype(p.scale_dtype) || (p.bias && !is_dtype(p.bias_dtype))) return "a dtype is unknown";
  if (p.level < PEFT_EXT_PORTABLE || p.level > peft_ext_best_level()) return "level isn't one of this processor's";
  if (p.groups < 1 || p.in_features % p.groups) return "groups have to divide in_features";
  if (p.groups > 1 && p.in_features / p.groups % 8) return "groups aren't whole bytes of inputs";
  if (counts.x < p.in_features || times(p.rows - 1, p.x_stride) > counts.x - p.in_features) return "x has fewer rows";
  if (counts.y != times(p.rows, p.out_features)) return "y has another size than rows and out_features";
  const int64_t tiles = p.out_features / kTileRows + (p.out_features % kTileRows != 0);
  const int64_t bytes = p.in_features / 8 + (p.in_features % 8 != 0);
  if (counts.planes != times(times(tiles, bytes), p.bits * kTileRows)) return "planes have another size than the weight";
  const int64_t of_one = times(p.out_features, p.groups), of_scale = times(of_one, p.binary ? p.bits : 1);
  if (counts.scale < of_scale || counts.scale % of_scale) return "scale has another size than out_features and groups";
  const int64_t scales = counts.scale / of_scale;
  if (p.choice) {
    if (counts.choice != p.rows) return "choice isn't one for each row";
    for (int64_t row = 0; row < p.rows; ++row) {
      if (p.choice[row] < 0 || p.choice[row] >= scales) return "choice names a scale that isn't there";
    }
  }
  if (p.zero_point) {
    if (p.binary) return "a binary coding has no zero_point";
    if (p.zero < PEFT_EXT_ZERO_BYTE || p.zero > PEFT_EXT_ZERO_CHOSEN) return "zero is unknown";
    if (counts.zero_point != (p.zero == PEFT_EXT_ZERO_CHOSEN ? times(scales, of_one) : of_one))
      return "zero_point has another size than scale";
  }
  if (p.bias && counts.bias != p.out_features) return "bias isn't one for each output";
  return nullptr;
}

PyObject* packed_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != kArguments) return PyErr_Format(PyExc_TypeError, "packed_linear takes %d integers, got %zd", kArguments, count);
  long long values[kArguments];
  for (int i = 0; i < kArguments; ++i) {
    // addresses may have the highest bit set
    const unsigned long long value = PyLong_AsUnsignedLongLongMask(arguments[i]);
    if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) return nullptr;
    values[i] = static_cast<long long>(value);
  }
  const long long* next = values;
  const auto address = [&next] { return reinterpret_cast<void*>(static_cast<intptr_t>(*next++)); };
  const auto number = [&next] { return static_cast<int32_t>(*next++); };
  peft_ext_problem problem;
  problem.x = address();
  problem.y = address();
  problem.x_dtype = number();
  problem.rows = *next++;
  problem.x_stride = *next++;
  problem.planes = static_cast<const uint8_t*>(address());
  problem.bits = number();
  problem.binary = number();
  problem.out_features = *next++;
  problem.in_features = *next++;
  problem.scale = address();
  problem.scale_dtype = number();
  problem.groups = *next++;
  problem.choice = static_cast<const int64_t*>(address());
  problem.zero_point = address();
  problem.zero = number();
  problem.bias = address();
  problem.bias_dtype = number();
  problem.exact = number();
  problem.threads = number();
  problem.level = number();
  Counts counts;
  for (int64_t* count : {&counts.x, &counts.y, &counts.planes, &counts.scale, &counts.choice, &counts.zero_point, &counts.bias})
    *count = *next++;
  if (*next != PEFT_EXT_KERNEL_VERSION) {
    return PyErr_Format(PyExc_RuntimeError, "this kernel has version %d, but its caller wants %lld",
                        PEFT_EXT_KERNEL_VERSION, *next);
  }
  if (const char* wrong = misfit(problem, counts)) return PyErr_Format(PyExc_ValueError, "packed_linear: %s", wrong);
  int failed;
  Py_BEGIN_ALLOW_THREADS
  failed = peft_ext_packed_linear(&problem);
  Py_END_ALLOW_THREADS
  if (failed == PEFT_EXT_NO_MEMORY) return PyErr_NoMemory();
  return PyBool_FromLong(failed == PEFT_EXT_LEFT_RANGE);
}

PyMethodDef methods[] = {
    {"packed_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(packed_linear)), METH_FASTCALL,
     "packed_linear(*fields of peft_ext_problem, *numbers at x, y, planes, scale, choice, zero_point and bias, version): see "
     "csrc/packed_linear.h. ValueError if they don't fit each other. True if the result left the range."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", "The CPU kernel of packed layers.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernel(void) {
  PyObject* self = PyModule_Create(&module);
  if (!self) return nullptr;
  if (PyModule_AddIntConstant(self, "VERSION", PEFT_EXT_KERNEL_VERSION) ||
      PyModule_AddIntConstant(self, "BEST_LEVEL", peft_ext_best_level())) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}
