# SPDX-License-Identifier: Apache-2.0
"""Prunes a teacher's heads and wins the loss back by distillation: the run of ``orion50``."""
