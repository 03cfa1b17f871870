# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""SG-ICL's presets, and options that are refused."""

from __future__ import annotations

import pytest

from tests.generation_ext.in_context.test_self_generated import sg_icl


def test_presets():
    paper, ours = sg_icl(), sg_icl(preset="recommended", draws=2)
    assert (paper.balanced, paper.shared, paper.calibrate, paper.draws, paper.keep) == (False, False, False, 1, 1.0)
    assert ours.balanced and ours.shared and ours.calibrate == "batch" and ours.draws == 2
    assert sg_icl(preset="recommended").draws == 8
    alone = sg_icl(preset="recommended", shared=False)
    assert alone.balanced and not alone.shared and alone.pool_inputs is None
    assert sg_icl(preset="recommended", calibrate=False).calibrate is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "preset='best' is unknown; choose one of"),
        ({"draws": 0}, "draws=0 must be a positive integer"),
        ({"keep": 0.0}, "keep=0.0 must be above 0 and at most 1"),
        ({"strength": -1}, "strength=-1 of the calibration must be above 0"),
        ({"calibrate": "batches"}, "calibrate='batches' is unknown"),
        ({"pool_inputs": 4}, "pool_inputs=4 needs shared=True"),
        ({"pool_inputs": -1, "shared": True}, "pool_inputs=-1 must be a positive integer, or 0"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sg_icl(**options)
