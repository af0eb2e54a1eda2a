from tests.jax.switches import compiled_programs_let_go, ranks_written_out

__all__ = ["compiled_programs_let_go", "ranks_written_out"]
