"""Networks of pure functions: what they must offer, and the checks of every call."""

from tokenexit_jax.networks.protocol import Embedded, Network

__all__ = [
    "Embedded",
    "Network",
]
