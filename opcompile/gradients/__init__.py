"""The operator's three derivatives, each a compiled kernel: the same rooms as one floor up, for what goes backward."""
