"""`python -m prism.bench.decode`: how fast models decode under a worker, beside plain SGLang."""

from prism.bench.cell_commands import cell_commands
from prism.bench.decode.cells import cells

main = cell_commands("decode", "How fast models decode under a worker, beside plain SGLang.", cells)

if __name__ == "__main__":
    main()
