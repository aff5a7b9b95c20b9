# SPDX-License-Identifier: Apache-2.0
"""Pruning runs with ORION's heads: their loss, their memory, their metrics. docs/use/orion.md."""
