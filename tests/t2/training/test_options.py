from __future__ import annotations

import pytest

FREE = {"steps", "patience", "test_size", "trackers", "token_budget", "save_every", "stream", "shard"}


def test_a_saved_run_goes_on_with_its_own_options(make_options):
    options = make_options()
    assert options.differences(options.to_dict()) == []


@pytest.mark.parametrize("free", [True, False])
def test_options_that_shape_a_run_may_not_change(make_options, free):
    options = make_options()
    for name in options.to_dict().keys() & FREE if free else options.to_dict().keys() - FREE:
        assert options.differences(options.to_dict() | {name: "another"}) == ([] if free else [name])
