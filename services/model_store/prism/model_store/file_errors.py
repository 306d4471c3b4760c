"""What a model fails with when its files can't be read: the path and the reason, never a bare OSError.

Errors of the bus are OSErrors too, so one of a file that got as far as them would be taken for one.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from prism.common.errors import ErrorCode, PrismError

_FORBIDDEN = (errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def reading(path: Path, hint: str = "") -> Iterator[None]:
    """Turn any OSError within the `with`, by default of `path`, into a PrismError(model_failed). `hint` says
    what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FORBIDDEN:
            hint = f"the model store runs as user {os.geteuid()}, who may not"
        raise PrismError(
            ErrorCode.MODEL_FAILED,
            f"{error.filename or path} cannot be read: {error.strerror or error}{hint and '; '}{hint}",
        ) from error
