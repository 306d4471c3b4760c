"""`python -m prism.bench.activation`: how fast models sleep and wake on a GPU."""

from prism.bench.activation.cells import cells
from prism.bench.cell_commands import cell_commands

main = cell_commands("activation", "How fast models sleep and wake on a GPU.", cells)

if __name__ == "__main__":
    main()
