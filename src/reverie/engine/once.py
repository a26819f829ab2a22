"""What is the same at every step, computed once a picture. A wrapper of `Predict`, exact up to the rounding of sums.

Two things: the keys and values of the prompt in every cross-attention of a U-Net, and, where guidance asks about one
`x` under several conditions, all that comes before the first look at the prompt. What else could be kept is too little
to be worth a name: the embeddings of time and of SDXL's vector and the residual blocks' projections of them are less
than a ten-thousandth of a step's work, and time is another at every step.
"""

from torch import Tensor, nn

from reverie.nets.attention import Attention
from reverie.nets.mmdit import MMDiT
from reverie.nets.unet import UNet
from reverie.sampling.guidance import tapped
from reverie.types import Cond, Predict, Taps

MOST = 4  # contexts that are remembered: guidance and what guides ask besides; prompts that change replace the oldest


class Prompts:
    """Keys and values of the latest contexts, by the layer that made them.

    A form of the network (LoRA, seamless) has layers of its own where it is another, and shares those that are the
    same: so a layer is all that a pair depends on beside the context. A context is known by its tensor: equal numbers
    in another tensor are another context. Memory for each context: `2 * B * M` numbers for each channel of each layer
    (SD 1.5 with guidance: 15 MB in float32; SDXL: 102 MB).
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, dict[nn.Module, tuple[Tensor, Tensor]]]] = {}

    def __call__(self, module: nn.Module, context: Tensor) -> tuple[Tensor, Tensor]:
        """`Attention.keys_values` of the context."""
        assert isinstance(module, Attention)
        pairs = self._of(context)
        if module not in pairs:
            pairs[module] = module.keys_values(context)
        return pairs[module]

    def _of(self, context: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        key = id(context)  # of a tensor that is kept, so that no other has it
        found = self._known.pop(key, None) or (context, {})
        self._known[key] = found  # the latest last
        if len(self._known) > MOST:
            del self._known[next(iter(self._known))]
        return found[1]


def once(predict: Predict, network: UNet | MMDiT) -> Predict:
    """`predict` that computes once what steps and conditions share. Make one for each run of a sampler.

    Args:
        network: what `predict` runs, or what that is a form of. A diffusion transformer has nothing to share: time
            modulates its prompt at every block.
    """
    if not isinstance(network, UNet):
        return predict
    prompts = Prompts()

    def sharing(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        return predict(x, sigma, tapped(cond, Taps(prompt=prompts, copies=copies(cond))))

    return sharing


def copies(cond: Cond) -> int:
    """How many times the same rows of `x` come, told apart by their context alone (`Taps.copies`).

    One where the time embedding or the channels may differ, too.
    """
    alone = cond.vector is None and cond.channels is None
    return len(cond.asked.names) if cond.asked and alone else 1
