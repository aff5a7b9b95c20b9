# SPDX-License-Identifier: Apache-2.0
"""A trained saliency model with half of its ViT removed: docs/use/example_saliency.md."""
