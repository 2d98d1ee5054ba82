"""The derivatives equal their oracle, and the oracle is the derivative."""

from __future__ import annotations

import pytest
from gradient_kernels import draw, gradients_of, kernel, stated_depth

from opcompile.cases import Case, tagged
from opcompile.gradients.bounds import compare

CORNERS = [
    c for c in tagged("corner") if c.spec.activation.name not in ("gelu", "gelu_tanh", "silu", "hard_silu", "mish")
]


@pytest.mark.parametrize("example", CORNERS, ids=lambda c: c.name)
def test_every_corner_case_is_exact_on_integers_and_within_the_bound_on_reals(example: Case) -> None:
    for gradient in gradients_of(example.spec):
        run = kernel(gradient)
        exact = example.spec.activation.name in ("none", "relu", "relu6")
        operands = draw(gradient, integers=2)
        compare(gradient, run(operands), operands, exact=exact).require()
        operands = draw(gradient)
        depth = stated_depth(gradient, operands["dy"].shape[0])
        compare(gradient, run(operands), operands, depth=depth).require()
