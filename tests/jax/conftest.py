from tests.jax.switches import compiled_quickly, ranks_written_out

__all__ = ["compiled_quickly", "ranks_written_out"]
