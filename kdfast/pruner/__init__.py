# SPDX-License-Identifier: Apache-2.0
"""The steps of ``kdfast prune``: checks, choice, cut, measurements, and what is shown of them."""
