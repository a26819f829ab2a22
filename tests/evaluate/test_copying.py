import torch

from reverie.evaluate.copying import nearest, nearness


def test_the_nearest_by_loops() -> None:
    g = torch.Generator().manual_seed(0)
    of, pool = torch.randn(5, 7, generator=g), torch.randn(9, 7, generator=g)
    want = [min(float((a - b).square().mean().sqrt()) for b in pool) for a in of]
    torch.testing.assert_close(nearest(of, pool), torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_copies_are_found() -> None:
    """Of 100 drawn pictures 30 are copies; true ones are as far from the pool as the other 70."""
    g = torch.Generator().manual_seed(0)
    pool, true, drawn = (torch.randn(100, 16, generator=g) for _ in range(3))
    honest = nearness(drawn, true, pool)
    assert honest.near.value < 0.06
    drawn[:30] = pool[:30] + 0.01
    found = nearness(drawn, true, pool)
    assert 0.3 <= found.near.value < 0.36
    assert found.json()["near_right"] == found.near.right
    assert found.true == honest.true
    assert found.drawn < honest.drawn
