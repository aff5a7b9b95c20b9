# SPDX-License-Identifier: Apache-2.0
"""Chains of distillations between timm models; ``kdfast.train`` is the entry point."""
