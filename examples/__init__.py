# SPDX-License-Identifier: Apache-2.0
"""Complete runs on trained models, with results: see docs/use/example_*.md. Not installed."""
