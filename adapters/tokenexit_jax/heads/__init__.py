"""Heads in JAX: weights from plans, and their application to the tokens that run or to whole batches."""
