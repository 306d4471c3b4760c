"""`python -m prism.gpu_worker doctor`: what a host lacks for engines on its GPUs, and how to fix it."""
