# SPDX-License-Identifier: Apache-2.0
"""Random calls of the ops, valid and invalid: ``python -m kdfast.testing.fuzz``, ``make fuzz``."""
