# SPDX-License-Identifier: Apache-2.0
"""I have my own ViT and training loop, and want it to look where a teacher looks:

``python examples/attention_loop.py`` trains a teacher of 4 heads and a student of 2 on digits.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import kdfast

STEPS, BATCH, WEIGHT = 300, 64, 0.5


class TinyViT(nn.Module):
    """Digits (B, 8, 8) to 10 logits: 16 patches of 2 x 2 pixels, attention alone."""

    def __init__(self, width: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(4, width)
        self.pos = nn.Parameter(0.02 * torch.randn(16, width))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor, teacher: Any = None) -> tuple[Tensor, Any, Tensor]:
        """Logits, queries and keys of every layer, and the distance to the teacher's maps."""
        x = self.embed(x.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)) + self.pos
        seen, distance = [], x.new_zeros(())
        for layer, (qkv, proj) in enumerate(zip(self.qkv, self.proj, strict=True)):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if teacher is None:  # (B, H, N, D) each
                out = kdfast.scaled_dot_product_attention(q, k, v)
            else:  # student head i imitates teacher head 2 i; no N x N map is held
                theirs = teacher[layer]
                heads = list(range(0, theirs[0].shape[1], theirs[0].shape[1] // self.heads))
                out, loss = kdfast.attention_distill(q, k, v, *theirs, teacher_heads=heads)
                distance = distance + loss / len(self.qkv)
            seen.append((q, k))
            x = x + proj(out.transpose(1, 2).flatten(2)).relu()
        return self.head(x.mean(1)), seen, distance


def train(model: TinyViT, teacher: TinyViT | None, steps: int) -> float:
    """Trains on digits, by labels and a teacher's attention; accuracy on those held out."""
    data = load_digits()
    x, y = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(0, 1400, (BATCH,))
        with torch.no_grad():
            maps = None if teacher is None else teacher(x[rows])[1]
        logits, _, attention = model(x[rows], maps)
        loss = cross_entropy(logits, y[rows]) + WEIGHT * attention
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(x[1400:])[0].argmax(1) == y[1400:]).float().mean())


def main(steps: int = STEPS) -> tuple[float, float]:
    """Accuracy of teacher and student."""
    torch.manual_seed(0)
    teacher, student = TinyViT(64, heads=4), TinyViT(32, heads=2)
    found = train(teacher, None, steps), train(student, teacher, steps)
    print(f"accuracy: teacher {found[0]:.3f}, student {found[1]:.3f}")
    return found


if __name__ == "__main__":
    main()
