# SPDX-License-Identifier: Apache-2.0
"""Words about models that several commands share."""

MODEL_HELP = "timm name, torchvision:NAME, hf:FOLDER or a saved model's folder"
