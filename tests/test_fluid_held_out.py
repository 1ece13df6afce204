"""Settings are chosen on what is else trained on, and nothing of the test period is seen there."""

import numpy as np

from livrec_fast.systems.fluid.material import Material, Source
from livrec_fast.systems.fluid.training import Settings

WORLD = (("users", 120), ("authors", 40), ("rooms", 80), ("videos", 150), ("live_events", 3000))


def test_the_test_period_is_left_out():
    source = Source(sizes=(*WORLD, ("days", 1.0)))
    whole = Material(source, Settings(), 3)
    held = Material(Source(sizes=source.sizes, held_out=True), Settings(), 3)
    assert held.asked.ts[-1] < whole.test.ts[0] and held.log.ts[-1] < whole.test.ts[0]
    train = whole.asked.ts[: len(whole.asked) - len(whole.test)]
    assert np.array_equal(held.asked.ts, train)
    assert 0.75 < 1 - len(held.test) / len(train) < 0.85
    assert held.codes.fitted_on < whole.codes.fitted_on and held.key != whole.key
