"""Networks that ship with the library."""
