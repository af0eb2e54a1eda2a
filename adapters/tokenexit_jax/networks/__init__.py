"""Networks of pure functions: what they must offer, and the checks of every call."""

from tokenexit_jax.networks.protocol import Block, Embedded, Heads, Network, Params

__all__ = [
    "Block",
    "Embedded",
    "Heads",
    "Network",
    "Params",
]
