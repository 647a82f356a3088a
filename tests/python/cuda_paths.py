"""Operators on a GPU by other than their usual path."""

import os
from contextlib import contextmanager


@contextmanager
def generic_path():
    """In ATen calls, without our kernels."""
    before = os.environ.get("XLSTM_CUDA_KERNELS")
    os.environ["XLSTM_CUDA_KERNELS"] = "off"
    try:
        yield
    finally:
        del os.environ["XLSTM_CUDA_KERNELS"]
        if before is not None:
            os.environ["XLSTM_CUDA_KERNELS"] = before
