# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files, and whether any is used without a word."""
