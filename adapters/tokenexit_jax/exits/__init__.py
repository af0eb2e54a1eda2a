"""Early exit of tokens: models, their forward pass and outputs."""
