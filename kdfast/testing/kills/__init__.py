# SPDX-License-Identifier: Apache-2.0
"""Kills a process at every file operation of a run, resumes it and compares all results.

``python -m kdfast.testing.kills`` is the command; docs/internals/reliability.md has its figures.
"""
