# SPDX-License-Identifier: Apache-2.0
"""Single camera views in ORION's preprocessing: items, batches, and the kinds that are files."""
