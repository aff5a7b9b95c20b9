# SPDX-License-Identifier: Apache-2.0
"""Ops: one file each with the public function, the eager reference and the registration."""

# Every op by name, which is that of its file here, and the file with its kernels for GPUs; an op
# with None runs its reference there.
OPS: dict[str, str | None] = {
    "pruned_attention": "kernels/pruned_attention.py",
    "attention_distill": "kernels/attention_distill.py",
    "attention_entropy": None,
    "kd_loss": "kernels/kd_loss.py",
    "linear_kd_loss": "kernels/kd_loss.py",
    "feature_loss": "kernels/feature_loss.py",
    "head_gather": "csrc/cuda/head_gather.cu",
    "head_gather_block": "csrc/cuda/head_gather.cu",
    "swiglu_norm": "kernels/swiglu_norm.py",
}
# Those with a Triton file of their own.
TRITON_OPS = tuple(op for op, file in OPS.items() if file == f"kernels/{op}.py")
