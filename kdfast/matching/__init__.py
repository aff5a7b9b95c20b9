# SPDX-License-Identifier: Apache-2.0
"""What layers of two models see and how far that is apart: attention maps and features.

``capture`` reads a forward, ``features`` and ``layers`` say which layers can be compared, and
``map_distance`` compares attention maps.
"""
