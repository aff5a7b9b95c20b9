# SPDX-License-Identifier: Apache-2.0
"""Pictures in tar shards that need not fit on this machine. See docs/use/data.md.

Every picture has an address (shard, position), so any order of them follows from numbers alone.
"""
