"""Other people's words for the operator, one module a system: each gives (spec, weight, bias)."""
