# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""What doesn't fit is refused before C++ (or a stretching operation of torch's) sees it, on every way in; `make sanitize`
runs this on a build that would tell of a single byte read beside the mark."""

import functools
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_ext.quant import kernel
from peft_ext.quant.formats import BinaryCoding, Uniform
from peft_ext.quant.functional import PackedWeight, mixed_packed_linear, packed_linear
from peft_ext.quant.kernel import CAPABILITY_VARIABLE, KERNEL_VARIABLE
from peft_ext.quant.linear import PackedLinear


OUT, IN, GROUPS = 64, 128, 4


@functools.cache
def parts(binary):
    generator = torch.Generator().manual_seed(0)
    number_format = BinaryCoding(3, IN // GROUPS) if binary else Uniform(4, IN // GROUPS)
    quantized = number_format.quantize(torch.randn(OUT, IN, generator=generator), "greedy" if binary else "minmax")
    return quantized, number_format.bits, torch.randn(OUT, generator=generator)


def layer(binary=False):
    return PackedLinear.from_quantized(*parts(binary))


def changed(**changes):
    return lambda given: {**given, **{name: change(given) for name, change in changes.items()}}


def scales(*shape, dtype=torch.float32):
    return lambda given: torch.ones(shape, dtype=dtype)


def planes(*shape, dtype=torch.uint8):
    return lambda given: torch.zeros(shape, dtype=dtype)


def choice(*indices, dtype=torch.int64):
    return lambda given: torch.tensor(indices, dtype=dtype)


def moved(name):
    return lambda given: given[name].to("meta")


# of the product of one weight; name -> the change of what fits, and what the error names
MISFITS = {
    "planes of 9 bits": (changed(planes=planes(2, 16, 9, 32)), "planes"),
    "planes of no bits": (changed(planes=planes(2, 16, 0, 32)), "planes"),
    "a tile too few": (changed(planes=planes(1, 16, 4, 32)), "planes"),
    "a tile too many": (changed(planes=planes(3, 16, 4, 32)), "planes"),
    "input bytes too few": (changed(planes=planes(2, 15, 4, 32)), "planes"),
    "tiles of 16 rows": (changed(planes=planes(4, 16, 4, 16)), "planes"),
    "planes as int8": (changed(planes=planes(2, 16, 4, 32, dtype=torch.int8)), "planes"),
    "planes as float": (changed(planes=planes(2, 16, 4, 32, dtype=torch.float32)), "planes"),
    "planes in three dimensions": (changed(planes=planes(2, 16, 128)), "planes"),
    "planes on meta": (changed(planes=moved("planes")), "planes"),
    "scale of two rows": (changed(scale=scales(2, GROUPS)), "scale"),
    "scale of one row": (changed(scale=scales(1, GROUPS)), "scale"),
    "scale of a row too many": (changed(scale=scales(OUT + 1, GROUPS)), "scale"),
    "scale of other groups": (changed(scale=scales(OUT, 8)), "zero_point|scale"),
    "scale of groups that don't divide": (changed(scale=scales(OUT, 3)), "scale"),
    "scale of no group": (changed(scale=scales(OUT, 0)), "scale"),
    "scale in one dimension": (changed(scale=scales(OUT)), "scale"),
    "scale in no dimension": (changed(scale=scales()), "scale"),
    "scale in three dimensions": (changed(scale=scales(OUT, GROUPS, 1)), "scale"),
    "scale transposed": (changed(scale=scales(GROUPS, OUT)), "scale"),
    "scale as int64": (changed(scale=scales(OUT, GROUPS, dtype=torch.int64)), "scale"),
    "scale as bool": (changed(scale=scales(OUT, GROUPS, dtype=torch.bool)), "scale"),
    "scale as complex": (changed(scale=scales(OUT, GROUPS, dtype=torch.complex64)), "scale"),
    "scale on meta": (changed(scale=moved("scale")), "scale is on meta"),
    "zero_point as int64": (changed(zero_point=lambda given: given["zero_point"].long()), "zero_point"),
    "zero_point as int8": (changed(zero_point=lambda given: given["zero_point"].to(torch.int8)), "zero_point"),
    "zero_point as bool": (changed(zero_point=lambda given: given["zero_point"].bool()), "zero_point"),
    "zero_point as complex": (changed(zero_point=lambda given: given["zero_point"].cfloat()), "zero_point"),
    "float zero_point of one row": (changed(zero_point=lambda given: given["zero_point"][:1].float()), "zero_point"),
    "float zero_point in three dimensions": (
        changed(zero_point=lambda given: given["zero_point"][None].float()),
        "zero_point",
    ),
    "zero_point of one row": (changed(zero_point=lambda given: given["zero_point"][:1]), "zero_point"),
    "zero_point of one group": (changed(zero_point=lambda given: given["zero_point"][:, :1]), "zero_point"),
    "zero_point on meta": (changed(zero_point=moved("zero_point")), "zero_point is on meta"),
    "zero_point missing": (changed(zero_point=lambda given: None), "scale"),
    "bias too short": (changed(bias=lambda given: torch.ones(OUT - 1)), "bias"),
    "bias of one": (changed(bias=lambda given: torch.ones(1)), "bias"),
    "bias of two dimensions": (changed(bias=lambda given: torch.ones(1, OUT)), "bias"),
    "bias as int64": (changed(bias=lambda given: torch.ones(OUT, dtype=torch.int64)), "bias"),
    "bias on meta": (changed(bias=moved("bias")), "bias is on meta"),
    "input too narrow": (changed(x=lambda given: torch.ones(2, IN - 8)), "in_features|planes"),
    "input too wide": (changed(x=lambda given: torch.ones(2, 2 * IN)), "in_features|planes"),
    "input of no dimension": (changed(x=lambda given: torch.ones(())), "the input|in_features|planes"),
    "input as int64": (changed(x=lambda given: torch.ones(2, IN, dtype=torch.int64)), "the input"),
    "input on meta": (changed(x=moved("x")), "planes is on cpu and the input on meta"),
    "out_features too small": (changed(out_features=lambda given: 1), "planes"),
    "out_features too large": (changed(out_features=lambda given: OUT + 1), "planes"),
    "out_features negative": (changed(out_features=lambda given: -OUT), "planes"),
}
# of a batch with scales of its own for each sample
MIXED = {
    "choice of 10**9": (changed(choice=choice(0, 10**9)), "choice has 1000000000, but there are 2"),
    "choice of 7": (changed(choice=choice(0, 7)), "choice has 7, but there are 2"),
    "choice of 2": (changed(choice=choice(2, 0)), "choice has 2, but there are 2"),
    "choice of -1": (changed(choice=choice(0, -1)), "choice has -1, but there are 2"),
    "choice as int32": (changed(choice=choice(0, 1, dtype=torch.int32)), "choice is int32"),
    "choice as uint8": (changed(choice=choice(0, 1, dtype=torch.uint8)), "choice is uint8"),
    "choice as bool": (changed(choice=choice(False, True, dtype=torch.bool)), "choice is bool"),
    "choice as float": (changed(choice=choice(0, 1, dtype=torch.float32)), "choice is float32"),
    "choice for one sample of two": (changed(choice=choice(0)), "choice is int64 .1."),
    "choice for three samples of two": (changed(choice=choice(0, 1, 0)), "choice is int64 .3."),
    "choice for none": (changed(choice=choice()), "choice is int64 .0."),
    "choice in two dimensions": (changed(choice=lambda given: torch.zeros(2, 1, dtype=torch.int64)), "choice is"),
    "choice on meta": (changed(choice=moved("choice")), "choice is"),
    "scales without their number": (changed(scale=lambda given: given["scale"][0]), "scale"),
    "scales of two rows": (changed(scale=scales(2, 2, GROUPS)), "scale"),
    "scales of no adapter": (changed(scale=scales(0, OUT, GROUPS)), "choice has 0, but there are 0"),
    "zero points of one adapter": (changed(zero_point=lambda given: given["zero_point"][None].float()), "zero_point"),
    "zero points of three adapters": (
        changed(zero_point=lambda given: given["zero_point"].expand(3, -1, -1).float()),
        "zero_point",
    ),
    "whole zero points of each": (
        changed(zero_point=lambda given: given["zero_point"].expand(2, -1, -1)),
        "zero_point",
    ),
    "no sample's dimension": (changed(x=lambda given: torch.ones(IN)), "choice"),
}


def given(mixed=False, binary=False):
    one = layer(binary)
    found = {"x": torch.randn(2, IN), "planes": one.planes.data, "scale": one.scale.data, "zero_point": one.zero_point}
    found.update(bias=one.bias, choice=None, out_features=OUT)
    if mixed:
        found.update(scale=torch.stack([one.scale.data, one.scale.data]), choice=torch.tensor([0, 1]))
    return found


def by_function(x, planes, scale, zero_point, bias, choice, out_features):
    weight = PackedWeight(planes, zero_point, out_features, IN)
    if choice is None:
        return packed_linear(x, weight, scale, bias)
    return mixed_packed_linear(x, weight, scale, choice, bias)


def by_operator(**tensors):
    return torch.ops.peft_ext.packed_linear(**tensors, exact=False)


WAYS = {
    "kernel": (by_function, "auto", True),
    "torch": (by_function, "torch", True),
    "training": (by_function, "auto", False),
    "operator": (by_operator, "auto", True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("misfit", [*MISFITS, *MIXED])
def test_misfit(misfit, way):
    function, mode, no_grad = WAYS[way]
    mixed = misfit in MIXED
    change, named = (MIXED if mixed else MISFITS)[misfit]
    if way == "operator" and "on meta" in misfit and misfit not in ("scale on meta", "bias on meta", "choice on meta"):
        pytest.skip("torch sends it to the meta device's implementation; see below")
    tensors = change(given(mixed))
    with kernel.using(**{KERNEL_VARIABLE: mode}), torch.no_grad() if no_grad else nullcontext():
        with pytest.raises((TypeError, ValueError), match=named) as raised:
            function(**tensors)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("misfit", [name for name in [*MISFITS, *MIXED] if "meta" not in name])
def test_misfit_to_a_compiler(misfit):
    """The operator's fake, which a compiler runs in its place, refuses what the operator does (but for values, which it
    doesn't have)."""
    mixed = misfit in MIXED
    change, named = (MIXED if mixed else MISFITS)[misfit]
    tensors = change(given(mixed))
    if mixed and named.startswith("choice has"):
        pytest.skip("a fake has no values")
    mode = FakeTensorMode()
    fake = {k: mode.from_tensor(v.detach()) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    with mode:
        with pytest.raises((TypeError, ValueError), match=named):
            by_operator(**fake)


def test_layer_refuses_other_scales():
    one, x = layer(), torch.randn(2, IN)
    two = torch.stack([one.scale.detach()] * 2)
    with torch.no_grad():
        with pytest.raises(ValueError, match="scale is float32 .2, 4.; expected float .64, groups."):
            one(x, scale=torch.ones(2, GROUPS))
        with pytest.raises(ValueError, match="choice has 7, but there are 2 scales"):
            one.forward_mixed(x, two, torch.tensor([0, 7]))


def test_a_layer_that_was_changed_by_hand_is_refused():
    one, x = layer(), torch.randn(2, IN)
    one.planes.data = one.planes.data[:1]
    with torch.no_grad(), pytest.raises(ValueError, match="planes are uint8 .1, 16, 4, 32."):
        one(x)


@pytest.mark.parametrize("binary", [False, True], ids=["uniform", "binary"])
@pytest.mark.parametrize("name", ["x", "scale", "planes", "bias"])
def test_negated_views(name, binary):
    """What torch negates when it is read (as the imaginary part of a conjugate) isn't in memory."""
    tensors = given(binary=binary)
    tensors[name] = torch._neg_view(tensors[name].detach())
    assert tensors[name].is_neg()
    with torch.no_grad():
        with kernel.using(**{KERNEL_VARIABLE: "torch"}):
            expected = by_function(**{**tensors, name: tensors[name].resolve_neg()})
        with kernel.using(**{KERNEL_VARIABLE: "exact"}):
            torch.testing.assert_close(by_function(**tensors), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                torch.ops.peft_ext.packed_linear(**tensors, exact=True), expected, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("mode", ["auto", "exact", "torch"])
@pytest.mark.parametrize("rows", [0, 2])
def test_no_inputs(mode, rows):
    """A weight without inputs gives the bias; so do no rows, none."""
    for binary in (False, True):
        weight = PackedWeight(
            torch.zeros(2, 0, 4, 32, dtype=torch.uint8),
            None if binary else torch.zeros(OUT, 1, dtype=torch.uint8),
            OUT,
            0,
        )
        scale, bias = torch.ones(OUT, 1, *([4] if binary else [])), torch.randn(OUT)
        with kernel.using(**{KERNEL_VARIABLE: mode}):
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    found = packed_linear(torch.ones(rows, 0), weight, scale, bias)
                    torch.testing.assert_close(found, bias.expand(rows, OUT), rtol=0, atol=0)
            mixed = mixed_packed_linear(
                torch.ones(2, 3, 0), weight, torch.stack([scale] * 2), torch.tensor([0, 1]), bias
            )
            torch.testing.assert_close(mixed, bias.expand(2, 3, OUT), rtol=0, atol=0)
            found = torch.ops.peft_ext.packed_linear(
                torch.ones(rows, 0), weight.planes, scale, weight.zero_point, bias, None, OUT, mode == "exact"
            )
            torch.testing.assert_close(found, bias.expand(rows, OUT), rtol=0, atol=0)


@pytest.mark.parametrize("capability", kernel.CAPABILITIES)
@pytest.mark.parametrize("groups", [1, GROUPS])
@pytest.mark.parametrize("binary", [False, True], ids=["uniform", "binary"])
def test_at_the_end_of_floats_range(capability, groups, binary):
    """Where a number leaves the range on the way, doubles step in; what the result is, tell doubles, too."""
    bits = 3 if binary else 4
    number_format = BinaryCoding(bits, IN // groups) if binary else Uniform(bits, IN // groups)
    generator = torch.Generator().manual_seed(0)
    quantized = number_format.quantize(torch.randn(OUT, IN, generator=generator), "greedy" if binary else "minmax")
    one = PackedLinear.from_quantized(quantized, bits, torch.randn(OUT, generator=generator))
    plain = torch.randn(2, IN, generator=generator)
    tensors = {"planes": one.planes.data, "zero_point": one.zero_point, "bias": one.bias, "choice": None}
    spiked = plain.clone()
    spiked[0, 5] = float("inf")
    spiked[1, 9] = float("nan")
    cases = [(plain * 10.0**power, one.scale.data * 10.0**-other) for power, other in
             [(37, 0), (38, 0), (38, 20), (38, 38), (20, 0), (20, -18), (-30, -37), (-36, 0), (0, -38)]]  # fmt: skip
    cases += [(spiked, one.scale.data), (plain, one.scale.data * float("inf"))]
    for x, scale in cases:
        tensors.update(x=x, scale=scale, out_features=OUT)
        exact = x.double() @ one.dequantize(scale.double()).t() + one.bias.double()
        for mode, tolerance in (("exact", 1e-5), ("auto", 2e-2)):
            with torch.no_grad(), kernel.using(**{CAPABILITY_VARIABLE: capability, KERNEL_VARIABLE: mode}):
                found = by_function(**tensors)
            inside, infinite = torch.isfinite(exact.float()), torch.isinf(exact.float())
            assert not torch.isfinite(found[~inside]).any()
            assert torch.equal(found[infinite], exact.float()[infinite])
            assert (found.double() - exact)[inside].norm() <= tolerance * exact[inside].norm(), (mode, x.abs().max())


def test_an_operator_at_the_end_of_floats_range():
    tensors = given(mixed=True)
    tensors["x"] *= 5e37
    with torch.no_grad():
        torch.testing.assert_close(by_operator(**tensors), by_function(**tensors), rtol=0, atol=0, equal_nan=True)


# the fields of csrc/module.cpp's call, in order
FIELDS = (
    *("x", "y", "x_dtype", "rows", "x_stride", "planes", "bits", "binary", "out_features", "in_features", "scale"),
    *("scale_dtype", "groups", "choice", "zero_point", "zero", "bias", "bias_dtype", "exact", "threads", "level"),
    *("of_x", "of_y", "of_planes", "of_scale", "of_choice", "of_zero_point", "of_bias", "version"),
)
WRONG = {
    "x": (0,),
    "y": (0,),
    "planes": (0,),
    "scale": (0,),
    "x_dtype": (-1, 3),
    "scale_dtype": (-1, 3),
    "bias_dtype": (-1, 3),
    "rows": (0, -1, 3, 2**62),
    "x_stride": (-1, IN + 1, 2**62),
    "bits": (0, -1, 3, 5, 9, 2**31),
    "out_features": (0, -1, OUT // 2, OUT + 1, 2 * OUT, 2**62, -(2**63)),
    "in_features": (0, -1, IN // 2, IN + 1, 2 * IN, 2**62, -(2**63)),
    "groups": (0, -1, 3, 32, 2 * GROUPS, 2**62),
    "zero": (-1, 3),
    "level": (-1, 3),
    "of_x": (0, -1, 2 * IN - 1),
    "of_y": (0, 2 * OUT - 1),
    "of_planes": (0, -1, 1),
    "of_scale": (0, -1, OUT * GROUPS - 1),
    "of_choice": (0, 1, 3),
    "of_zero_point": (0, OUT * GROUPS - 1),
    "of_bias": (0, OUT - 1, OUT + 1),
    "version": (0, 3),
}


@pytest.fixture
def called(monkeypatch):
    """A call that fits, with a choice of scales, by field."""
    module, calls = kernel._module(), []
    if module is None:
        pytest.skip("the kernel isn't built")

    class Recorder:
        BEST_LEVEL = module.BEST_LEVEL  # asked for where an earlier test has made the module forget it

        @staticmethod
        def packed_linear(*arguments):
            calls.append(arguments)
            return module.packed_linear(*arguments)

    tensors = given(mixed=True)
    monkeypatch.setattr(kernel, "_module", lambda: Recorder)
    by_operator(**tensors)
    monkeypatch.undo()
    # what the addresses are of has to live on: the tensors as they are, and a result of the same size
    found = dict(zip(FIELDS, calls[-1], strict=True))
    result = torch.empty(2, OUT)
    found["y"] = result.data_ptr()
    yield found, module.packed_linear
    del tensors, result


@pytest.mark.parametrize("field", WRONG)
def test_the_door_holds_sizes_against_what_is_there(called, field):
    """Called with numbers that don't fit: no division by zero, nothing read beside the tensors."""
    found, function = called
    assert function(*found.values()) is False
    for wrong in WRONG[field]:
        with pytest.raises(RuntimeError if field == "version" else ValueError):
            function(*{**found, field: wrong}.values())


@pytest.mark.parametrize("index", [-1, 2, 2**62])
def test_the_door_looks_at_the_choice(called, index):
    found, function = called
    wrong = torch.tensor([0, index])
    with pytest.raises(ValueError, match="choice names a scale"):
        function(*{**found, "choice": wrong.data_ptr()}.values())
