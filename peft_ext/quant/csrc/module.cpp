// Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
// The Python module `peft_ext.quant._kernel`: addresses and sizes in, nothing of torch's.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include "packed_linear.h"

namespace {

constexpr int kArguments = 22;

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
  if (*next != PEFT_EXT_KERNEL_VERSION) {
    return PyErr_Format(PyExc_RuntimeError, "this kernel has version %d, but its caller wants %lld",
                        PEFT_EXT_KERNEL_VERSION, *next);
  }
  int failed;
  Py_BEGIN_ALLOW_THREADS
  failed = peft_ext_packed_linear(&problem);
  Py_END_ALLOW_THREADS
  if (failed == PEFT_EXT_NO_MEMORY) return PyErr_NoMemory();
  return PyBool_FromLong(failed == PEFT_EXT_LEFT_RANGE);
}

PyMethodDef methods[] = {
    {"packed_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)(void)>(packed_linear)), METH_FASTCALL,
     "packed_linear(*fields of peft_ext_problem, version): see csrc/packed_linear.h. True if the result left the range."},
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
