"""What a network predicts, as four numbers and a training target (Karras et al. 2022, Table 1).

`x0 = c_skip * x + c_out * F(c_in * x, c_noise)`. Sampling reads the four numbers, training the target of `F`:
one object for both, so that the two cannot disagree.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from reverie.registry import Registry

# A noise level: one number, or a tensor that broadcasts to the sample.
L = TypeVar("L", float, Tensor)


@dataclass(frozen=True)
class Coefficients(Generic[L]):
    """`c_skip`, `c_out` and `c_in` at one noise level (`c_noise` is `Process.timestep`)."""

    skip: L
    out: L
    into: L


class Parameterisation(Protocol):
    """One way to read a network's output."""

    name: str

    def at(self, sigma: L) -> Coefficients[L]:
        """The coefficients at `sigma`."""
        ...

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should say for `x = alpha x0 + sigma noise`; shaped like `x0`."""
        ...

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error of `F` that equals weight 1 on the squared error of x0: `c_out²`."""
        ...


class Eps:
    """The network predicts the noise (Ho et al. 2020, equation 14). `x0 = x - sigma * F(x / sqrt(1 + sigma²))`."""

    name = "epsilon"

    def at(self, sigma: L) -> Coefficients[L]:
        """The coefficients at `sigma`."""
        return Coefficients(sigma**0, -sigma, (1 + sigma**2) ** -0.5)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """sigma²."""
        return sigma**2


class V:
    """The network predicts `v = sqrt(ᾱ) noise - sqrt(1 - ᾱ) x0` (Salimans & Ho 2022, appendix D)."""

    name = "v_prediction"

    def at(self, sigma: L) -> Coefficients[L]:
        """The coefficients at `sigma`."""
        inverse = (1 + sigma**2) ** -0.5
        return Coefficients(inverse**2, -sigma * inverse, inverse)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`(noise - sigma x0) / sqrt(1 + sigma²)`."""
        return (noise - sigma * x0) * (1 + sigma**2) ** -0.5

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """sigma² / (1 + sigma²)."""
        return sigma**2 / (1 + sigma**2)


class X0:
    """The network predicts the clean sample."""

    name = "sample"

    def at(self, sigma: L) -> Coefficients[L]:
        """The coefficients at `sigma`."""
        return Coefficients(0 * sigma, sigma**0, (1 + sigma**2) ** -0.5)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample."""
        return x0

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """1."""
        return sigma**0


class Flow:
    """The network predicts the velocity `noise - x0` of the straight path (Esser et al. 2024, equation 13)."""

    name = "flow_prediction"

    def at(self, sigma: L) -> Coefficients[L]:
        """The coefficients at `sigma`."""
        return Coefficients(sigma**0, -sigma, sigma**0)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`noise - x0`."""
        return noise - x0

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """sigma²."""
        return sigma**2


class Edm:
    """The network is preconditioned for data of a standard deviation that need not be 1 (Karras et al. 2022, Table 1).

    Not in the table below: it belongs to `EdmProcess`, with which its number is shared.

    Args:
        sigma_data: standard deviation of the data: 0.5 in the paper and in Playground 2.5, 1 in CosXL.
        v: whether it says the opposite, as v is meant: `c_out` is negative. With sigma_data 1 that is `V`.
    """

    def __init__(self, sigma_data: float = 0.5, *, v: bool = False) -> None:
        self.name = "edm_v" if v else "edm"
        self.sigma_data = sigma_data
        self.sign = -1 if v else 1

    def at(self, sigma: L) -> Coefficients[L]:
        """The coefficients at `sigma`."""
        inverse = (sigma**2 + self.sigma_data**2) ** -0.5
        out = self.sign * self.sigma_data * sigma * inverse
        return Coefficients((self.sigma_data * inverse) ** 2, out, inverse)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`(x0 - c_skip x) / c_out`, which for `x = x0 + sigma noise` has variance 1."""
        k = self.at(sigma)
        return (x0 - k.skip * (x0 + sigma * noise)) / k.out

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """sigma² sigma_data² / (sigma² + sigma_data²)."""
        return self.at(sigma).out ** 2


PARAMETERISATIONS = Registry[Parameterisation]("prediction type")
PARAMETERISATIONS.add(Eps.name, Eps(), ("eps",))
PARAMETERISATIONS.add(V.name, V(), ("v",))
PARAMETERISATIONS.add(X0.name, X0(), ("x0",))
PARAMETERISATIONS.add(Flow.name, Flow(), ("flow",))
