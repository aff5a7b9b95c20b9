# SPDX-License-Identifier: Apache-2.0
"""Labelled driving data in ORION's formats; see docs/use/orion_data.md."""
