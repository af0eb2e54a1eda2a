"""The JAX adapter: the same exits under `jit`, with static shapes. Nothing is here yet."""

__all__: list[str] = []
