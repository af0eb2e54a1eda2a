"""How often XLA compiles."""


class Compilations:
    """Counts what XLA is given to compile."""

    count = 0

    def __call__(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"
