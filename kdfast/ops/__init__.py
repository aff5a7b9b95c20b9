# SPDX-License-Identifier: Apache-2.0
"""Ops: one file each with the public function, the eager reference and the registration."""
