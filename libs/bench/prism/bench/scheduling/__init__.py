"""`make bench-scheduling`: the schedulers against each other and against their baselines, in the
simulator."""
