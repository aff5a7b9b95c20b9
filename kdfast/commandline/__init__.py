# SPDX-License-Identifier: Apache-2.0
"""What can be typed after a command: one file each, which imports nothing heavy.

So ``--help`` and errors of a command line come at once, before torch is imported.
"""
