# SPDX-License-Identifier: Apache-2.0
"""Pictures in tar shards and tables that need not fit on this machine. See docs/use/shards.md.

Every picture has an address (shard, position), so any order of them follows from numbers alone.
"""
