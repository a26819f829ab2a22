"""Token merging (Bolya & Hoffman 2023, Token Merging for Fast Stable Diffusion): self-attention over fewer tokens.

The tokens of a map are divided into squares. One token of each square is a target, the others are sources. The sources
that are most like some target are averaged into it; after attention each of them gets what its target got.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_SCORES = 2**26  # of sources and targets at a time: 256 MiB in float32


class TokenMerging:
    """Which tokens of a map are merged into which; row by row of the batch, and each row by itself.

    Args:
        tokens: `(B, rows * columns, C)`, by which they are compared (cosine).
        ratio: share of all tokens that is merged away; no more than there are sources, and none where the map is
            smaller than a square.
        stride: side of a square. Rows and columns beyond the last whole square are sources.
        random: chooses the target of each square; the first token of each if None.
    """

    def __init__(
        self, tokens: Tensor, rows: int, columns: int, ratio: float, stride: int, random: torch.Generator | None = None
    ) -> None:
        self.count = rows * columns
        self.targets, self.sources = (
            places.to(tokens.device) for places in divided(rows, columns, stride, random)
        )  # `(T,)` and `(S,)`, places in the map
        best, nearest = _nearest(F.normalize(tokens, dim=-1), self.sources, self.targets)
        order = best.argsort(dim=1, descending=True, stable=True)
        merged = min(int(self.count * ratio), len(self.sources)) if len(self.targets) else 0
        self._merged, self._kept = order[:, :merged, None], order[:, merged:, None]  # among the sources
        self._into = nearest.gather(1, order[:, :merged])[..., None]  # among the targets

    def merge(self, x: Tensor) -> Tensor:
        """`(B, N, C)` -> `(B, M, C)`: the sources that are kept, then the targets with what is merged into them."""
        sources, targets = x[:, self.sources], x[:, self.targets]
        moved = _taken(sources, self._merged)
        into = self._into.expand_as(moved)
        return torch.cat([_taken(sources, self._kept), targets.scatter_reduce(1, into, moved, "mean")], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """`(B, M, C)` -> `(B, N, C)`: each token gets what became of it."""
        kept, targets = torch.split(x, [self._kept.shape[1], len(self.targets)], dim=1)
        places = self.sources.expand(len(x), -1)[..., None]
        whole = x.new_empty(len(x), self.count, x.shape[2])
        whole[:, self.targets] = targets
        for among, part in ((self._kept, kept), (self._merged, _taken(targets, self._into))):
            whole.scatter_(1, places.gather(1, among).expand_as(part), part)
        return whole


def divided(rows: int, columns: int, stride: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The places of targets and of sources in a map, each in rising order."""
    down, across = rows // stride, columns // stride
    chosen = torch.zeros(down, across, dtype=torch.long)
    if random is not None:
        chosen = torch.randint(stride**2, (down, across), generator=random)
    row = torch.arange(down)[:, None] * stride + chosen // stride
    column = torch.arange(across) * stride + chosen % stride
    target = torch.zeros(rows * columns, dtype=torch.bool)
    target[(row * columns + column).flatten()] = True
    return target.nonzero()[:, 0], (~target).nonzero()[:, 0]


def _nearest(unit: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each source `(B, S)` the greatest cosine with a target, and which target that is."""
    if not len(targets):
        return unit.new_zeros(len(unit), len(sources)), sources.new_zeros(len(unit), len(sources))
    across = unit[:, targets].transpose(1, 2)
    size = max(MOST_SCORES // max(len(unit) * len(targets), 1), 1)
    found = [(unit[:, part] @ across).max(dim=-1) for part in torch.split(sources, size)]
    return torch.cat([one.values for one in found], dim=1), torch.cat([one.indices for one in found], dim=1)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of `x (B, N, C)` at `places (B, K, 1)`."""
    return x.gather(1, places.expand(-1, -1, x.shape[2]))
