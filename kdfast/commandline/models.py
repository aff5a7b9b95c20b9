# SPDX-License-Identifier: Apache-2.0
"""Words about models that several commands share."""

MODEL_HELP = "timm name, torchvision:NAME, hf:NAME, or a saved model's folder or file"
