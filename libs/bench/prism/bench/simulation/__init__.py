"""The simulator: the real placement, admission and quota decisions against traces, on a clock of its own."""
