# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one flat file per op; imported as ``kdfast.kernels`` and only on CUDA devices."""

if __name__ != "kdfast.kernels":
    raise ImportError(
        f"this folder holds kdfast's Triton kernels: import kdfast.kernels instead of {__name__!r}"
    )
