"""Early exit of tokens: models, their forward pass, its layouts and outputs."""
