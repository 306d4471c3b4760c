"""Where engines run: what a worker needs to know of the hardware, behind one interface."""
