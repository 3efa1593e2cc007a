"""Memory model: what one rank needs in a stage of a run, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

# Parameter-sized tensors that an optimizer keeps for each parameter.
OPTIMIZER_STATES = {"adam": 2, "rmsprop": 1, "sgd": 1}
# On top of the counted bytes: convolution workspaces, fragmentation of the allocator, the images.
HEADROOM = 1.3


@dataclass(frozen=True)
class Footprint:
    """Memory and operations of one rank in one step of a stage.

    Attributes:
        bytes: parameters, gradients, optimizer state, moving average, and the peak of a step's activations.
        g, d: parameters of the generator and of the discriminator.
        trained_g, trained_d: the parameters that have gradients.
        flops_g, flops_d: floating-point operations of matrix products and convolutions in one update of each network,
            including second-order ones.
    """

    bytes: float
    g: int
    d: int
    trained_g: int
    trained_d: int
    flops_g: int
    flops_d: int


def model_state_bytes(g: int, d: int, optimizer: str, shards: int) -> float:
    """Bytes, in float32, of parameters, gradients, the generator's moving average and optimizer state.

    Args:
        g, d: parameters of the generator and of the discriminator.
        optimizer: adam, rmsprop or sgd.
        shards: ranks over which ZeRO divides the optimizer state; 1 without ZeRO.
    """
    return (2 * (g + d) + g + OPTIMIZER_STATES[optimizer] * (g + d) / shards) * 4
