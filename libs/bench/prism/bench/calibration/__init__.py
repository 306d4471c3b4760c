"""What GPUs and models cost, fitted from measurements: of published rows, and of a running system."""
