"""jgrpo.policy.lora: the adapter's product, as each backend computes it."""

import jax
import numpy as np
import pytest

from jgrpo.policy import backend
from jgrpo.policy.lora import adapted, own_columns


@pytest.mark.parametrize("ranks", [(1,), (8,), (9,), (1, 4, 2), (4, 4, 4)])
def test_sums_over_few_columns_are_the_product(monkeypatch, ranks):
    """And each token has its own member's columns alone, whatever the others hold."""
    rng, rank = np.random.default_rng(0), sum(ranks)
    x, w, a, b = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((6, 16), (16, 24), (16, rank), (rank, 24))
    )
    members = np.arange(6, dtype=np.uint32) % len(ranks)
    owner = np.repeat(np.arange(len(ranks)), ranks)
    mine = (members[:, None] == owner) if len(ranks) > 1 else np.ones((6, rank), bool)
    expected = x.astype(np.float64) @ w + np.where(mine, x.astype(np.float64) @ a, 0) @ b
    own = own_columns(members, ranks) if len(ranks) > 1 else None
    texts = []
    for n_columns in (0, 8):
        changed = backend.CPU._replace(lora_columns_summed=n_columns)
        monkeypatch.setattr(backend, "CPU", changed)
        function = jax.jit(lambda *given: adapted(*given))
        np.testing.assert_allclose(function(x, w, a, b, own), expected, rtol=1e-4, atol=1e-4)
        texts.append(function.lower(x, w, a, b, own).as_text().count("dot_general"))
    assert texts == [3, 3 if rank > 8 else 2]
