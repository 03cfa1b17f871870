# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""The CPU kernel, built where there is a C++ compiler; everything else about the package is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup


setup(
    ext_modules=[
        Extension(
            "peft_ext.quant._kernel",
            sources=sorted(glob("peft_ext/quant/csrc/*.cpp")),
            depends=sorted(glob("peft_ext/quant/csrc/*.h")),
            language="c++",
            # one binary for all processors: each path names its own instructions, and run time chooses
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-maybe-uninitialized"],
            py_limited_api=True,
            # without a compiler the package installs and runs on torch's own operations
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
