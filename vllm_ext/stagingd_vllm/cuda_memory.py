# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Registering host memory that is mapped read-only, for kernels to read."""

from __future__ import annotations

from cuda.bindings import runtime

_FLAGS = runtime.cudaHostRegisterMapped | runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterReadOnly


def register(address: int, size: int) -> str | None:
    """Register memory; gives the runtime's name for what went wrong, None when nothing did."""
    (status,) = runtime.cudaHostRegister(address, size, _FLAGS)
    if status != runtime.cudaError_t.cudaSuccess:
        runtime.cudaGetLastError()  # forgets it: else torch would take it for the failure of its next kernel
        if status == runtime.cudaError_t.cudaErrorNotSupported:
            return f"{status.name}, this driver registers no memory that is mapped read-only"
        return str(status.name)
    status, seen = runtime.cudaHostGetDevicePointer(address, 0)
    if status != runtime.cudaError_t.cudaSuccess or int(seen) != address:
        runtime.cudaHostUnregister(address)
        runtime.cudaGetLastError()
        return f"the device sees host memory elsewhere than the host does ({status.name})"
    return None


def unregister(address: int) -> None:
    """Take a registration back."""
    runtime.cudaHostUnregister(address)
