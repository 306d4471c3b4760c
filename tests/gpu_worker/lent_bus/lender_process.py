"""A lender whose driver is stood in for. Run as a module."""

from tests.gpu_worker.engine.mapping_driver import MappingDriver

from prism.gpu_worker.engine import cuda_driver
from prism.gpu_worker.lent_bus.lender import main

if __name__ == "__main__":
    fake = MappingDriver()
    for call in [name for name in vars(cuda_driver) if hasattr(fake, name)]:
        setattr(cuda_driver, call, getattr(fake, call))
    main()
