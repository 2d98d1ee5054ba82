"""How the declared operator runs fast: one module a target, and tuned records as package data."""
