from __future__ import annotations

import pytest

from t2.weights.targets import is_meant


@pytest.mark.parametrize(
    ("name", "targets", "meant"),
    [
        ("layers.0.attn.o_proj", ["o_proj"], True),
        ("o_proj", ["o_proj"], True),
        ("layers.0.attn.o_proj", ["attn.o_proj", "k_proj"], True),
        ("layers.0.attn.qo_proj", ["o_proj"], False),
        ("layers.0.o_proj.inner", ["o_proj"], False),
        ("layers.0.mlp.up_proj", "mlp", True),
        ("layers.0.self_attn.q_proj", "mlp", False),
        ("layers.0.self_attn.q_proj", r".*\.q_proj", True),
        ("layers.0.self_attn.q_proj.more", r".*\.q_proj", False),
    ],
)
def test_names_end_with_a_suffix_or_match_as_a_whole(name, targets, meant):
    assert is_meant(name, targets) == meant
