"""Requests over time: what a trace is, files that hold one, and traces that are made up."""
