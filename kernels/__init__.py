# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one flat file per op; imported as ``kdfast.kernels`` and only on CUDA devices."""

if __name__ != "kdfast.kernels":
    # In the root of a checkout this folder is found as "kernels", a package that transformers looks
    # for, imports and asks for its version: it must turn out too old to be that one, and empty.
    __version__ = "0.0.0"
    __path__ = []
