"""The three models hold the same weights under the same names."""

import jax
import numpy as np

from parity.checks import check_state_dict
from parity.models import Models
from parity.outcomes import Prove


def test_every_weight_is_hugging_faces(gpt2_124m: Models, prove: Prove) -> None:
    check = check_state_dict(gpt2_124m)
    prove(check)
    assert check.figure == "149 of 149 weights equal"


def test_reference_has_hugging_faces_keys_and_shapes(gpt2_124m: Models) -> None:
    theirs = gpt2_124m.huggingface.state_dict()
    ours = gpt2_124m.reference.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].equal(weight) for name, weight in theirs.items())


def test_tied_heads_are_one_array(gpt2_124m: Models) -> None:
    reference = gpt2_124m.reference
    assert reference.lm_head.weight is reference.transformer.wte.weight
    assert "lm_head" not in gpt2_124m.params


def test_untied_heads_are_two_arrays(small: Models) -> None:
    assert small.reference.lm_head.weight is not small.reference.transformer.wte.weight
    assert check_state_dict(small).passed


def test_a_changed_weight_is_named(small: Models) -> None:
    kernel = small.params["h_1"]["mlp"]["c_fc"]["kernel"]
    params = jax.tree.map(lambda array: array, small.params)
    params["h_1"]["mlp"]["c_fc"]["kernel"] = kernel.at[3, 5].add(0.25)
    changed = Models(small.huggingface, small.reference, params, small.config)

    check = check_state_dict(changed)
    assert not check.passed
    [detail] = check.details
    assert "transformer.h.1.mlp.c_fc.weight differs by up to 2.5e-01" in detail


def test_the_random_weights_leave_nothing_at_zero_or_one(small: Models) -> None:
    # A bias of zero or a scale of one would hide a mistake in how it is used.
    for array in jax.tree.leaves(small.params):
        assert np.std(array) > 0.05
