# SPDX-License-Identifier: Apache-2.0
"""A small ViT on CIFAR-10, pruned to half of its heads and units: docs/use/example_cifar10.md."""
