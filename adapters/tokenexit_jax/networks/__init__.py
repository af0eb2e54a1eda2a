"""Networks of pure functions: what they must offer, and the checks of every call."""
