# SPDX-License-Identifier: Apache-2.0
"""Distillation of a ViT by another one, mostly of a pruned one by its original.

``run`` is the whole run; ``terms`` says what of the two models can be compared, ``objective``
compares it, ``pictures`` reads the data, ``evaluate`` measures and ``report`` tells.
"""
