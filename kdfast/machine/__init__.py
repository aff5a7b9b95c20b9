# SPDX-License-Identifier: Apache-2.0
"""What is asked of the machine: files that are whole, clocks, memory, and its name."""
