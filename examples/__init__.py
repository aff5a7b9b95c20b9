# SPDX-License-Identifier: Apache-2.0
"""Short scripts to start from, and complete runs on trained models: docs/use/start.md.

Not installed.
"""
