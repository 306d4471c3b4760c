"""Weights that travel through the bus of another GPU of the node, and from it to where they are needed.

A process a GPU lends its bus (`lender`); an engine that wakes borrows it (`borrowing`): it hands over file
descriptors of its image in host memory and of its own GPU memory, and the lender copies from one into the
other. Neither has a copy of anything.
"""
