# SPDX-License-Identifier: Apache-2.0
"""Configs: a function each, which returns a tree of frozen dataclasses; see docs/use/training.md.

``recovery.py`` and ``chain.py`` hold the dataclasses of the two runs, ``load.py`` reads and writes.
"""

from kdfast.configs.chain import ChainConfig
from kdfast.configs.fields import ConfigError, plain
from kdfast.configs.load import CONFIGS, as_yaml, load, save
from kdfast.configs.recovery import Config

__all__ = ["CONFIGS", "ChainConfig", "Config", "ConfigError", "as_yaml", "load", "plain", "save"]
