# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import kdfast
from kdfast.chain.cache_rows import Layout, encode
from kdfast.chain.teacher_cache import TeacherCache, model_hash, teacher_key
from kdfast.data.labelled import build_classification

KEY = {"teacher": "t", "data": "d", "normalise": (0.5, 0.5)}


class Numbers(Dataset):
    """Twelve 'images' that name themselves: (index, variant)."""

    def __init__(self, length=12, variants=2):
        self.length, self.variants = length, variants

    def __len__(self):
        return self.length

    def __getitem__(self, pair):
        index, variant = pair
        return {"image": torch.tensor([float(index), float(variant)])}


def table(images, classes=5):
    """Row-wise logits with two decimals up to about 40."""
    index, variant = images[:, 0], images[:, 1]
    c = torch.arange(classes)
    return 40 * torch.sin(7 * index[:, None] + 3 * variant[:, None] + c)


def everything(cache):
    rows = [cache.logits(range(cache.layout.length), v) for v in range(cache.layout.variants)]
    return torch.stack(rows)


def expected(classes=5, length=12, variants=2):
    pairs = [[(float(i), float(v)) for i in range(length)] for v in range(variants)]
    return torch.stack([table(torch.tensor(row), classes) for row in pairs])


def test_float32_is_the_teacher_bit_for_bit(tmp_path):
    cache = TeacherCache.build(
        table, Numbers(), tmp_path / "c", key=KEY, dtype="float32", batch_size=5
    )
    assert torch.equal(everything(cache), expected())
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "meta.json",
        "sums.npy",
        "values.npy",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    mixed = TeacherCache.open(tmp_path / "c", KEY).logits(torch.tensor([3, 11, 3]), [1, 0, 0])
    assert torch.equal(mixed, expected()[[1, 0, 0], [3, 11, 3]])


def test_float16_rounds_the_distance_to_the_largest(tmp_path):
    cache = TeacherCache.build(table, Numbers(), tmp_path / "c", key=KEY)
    got, want = everything(cache), expected()
    below = want.amax(-1, keepdim=True) - want
    bound = below * 2**-11 + 2**-25 + 40 * 2**-23
    assert ((got - want).abs() <= bound).all()
    assert not torch.equal(got, want)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert torch.equal(got.amax(-1), want.amax(-1))


def test_kept_classes_and_the_rest_have_the_literal_probabilities():
    # exp(z / T) is 8, 4, 2, 1, 1 at T = 2: probabilities 1/2, 1/4, 1/8, 1/16, 1/16.
    logits = 2 * torch.log(torch.tensor([[1.0, 8.0, 2.0, 4.0, 1.0]]))
    rows = encode(logits, Layout("float32", 2, 2.0, 1, 1, classes=5))
    assert rows["classes"].tolist() == [[1, 3]]
    assert rows["odds"] == pytest.approx(np.log(1 / 3), abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_has_the_exact_mass_and_spreads_the_rest(tmp_path, dtype, top_k):
    temperature = 3.0
    cache = TeacherCache.build(
        table, Numbers(), tmp_path / "c", key=KEY, top_k=top_k, temperature=temperature, dtype=dtype
    )
    exact = (expected() / temperature).double().softmax(-1)
    got = (everything(cache).double() / temperature).softmax(-1)
    best, classes = exact.topk(top_k, dim=-1)
    loose = 1e-5 if dtype == "float32" else 80 * 2**-11 / temperature
    torch.testing.assert_close(got.gather(-1, classes), best, rtol=loose, atol=0)
    rest = got.scatter(-1, classes, 0)
    # The mass does not suffer from the 16 bits.
    torch.testing.assert_close(rest.sum(-1), 1 - best.sum(-1), rtol=2e-5, atol=1e-12)
    others = rest[rest > 0].view(2, 12, 5 - top_k)
    torch.testing.assert_close(others, others[..., :1].expand_as(others))
    mass = torch.stack([cache.rest(range(12), v) for v in (0, 1)])
    torch.testing.assert_close(mass.double(), 1 - best.sum(-1), rtol=2e-6, atol=1e-12)


def test_all_classes_kept_is_no_approximation(tmp_path):
    cache = TeacherCache.build(
        table, Numbers(), tmp_path / "c", key=KEY, top_k=9, dtype="float32", batch_size=7
    )
    assert torch.equal(everything(cache), expected())
    assert cache.rest([0, 1], 0).tolist() == [0.0, 0.0]


class Net(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        return 9 * self.head(self.body(images))


@pytest.fixture(scope="module")
def digits():
    return build_classification("digits", size=8, seed=0, variants=2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loss_with_cache_against_live_teacher(tmp_path, digits, dtype):
    teacher, temperature = Net(), 4.0
    key = teacher_key(teacher, digits.facts)
    state = torch.get_rng_state()
    cache = TeacherCache.build(
        teacher, digits.train, tmp_path / "c", key=key, batch_size=100, dtype=dtype
    )
    assert torch.equal(state, torch.get_rng_state())
    assert teacher.training and all(m.training for m in teacher.modules())
    teacher.eval()
    student = Net().eval()
    digits.train.set_epoch(1)
    for batch in list(DataLoader(digits.train, batch_size=100))[:3]:
        with torch.no_grad():
            live, mine = teacher(batch["image"]), student(batch["image"])
        cached = cache.logits(batch["index"], batch["variant"])
        losses = [
            kdfast.kd_loss(mine, t, batch["target"], temperature=temperature, backend="reference")
            for t in (live, cached)
        ]
        if dtype == "float32":
            assert torch.equal(live, cached)
            assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
            continue
        # docs/use/teacher_cache.md: d is the largest error of a log-probability.
        d = 2 * float((live.amax(1) - live.amin(1)).max()) * 2**-11 / temperature + 1e-6
        gap = (live / temperature).log_softmax(1) - (mine / temperature).log_softmax(1)
        bound = temperature**2 * (np.expm1(d) * float(gap.abs().max()) + d)
        assert 0 < abs(float(losses[0][1] - losses[1][1])) <= bound
        assert bound < 0.05 * float(losses[0][1])
    digits.train.set_epoch(0)


class Stops(Exception):
    pass


def counting(fail_at, calls):
    def teacher(images):
        if len(calls) == fail_at:
            raise Stops
        calls.append(images[:, 0].tolist())
        return table(images)

    return teacher


def build(directory, teacher, **options):
    return TeacherCache.build(
        teacher, Numbers(), directory, **{"key": KEY, "dtype": "float32", "batch_size": 5} | options
    )


def test_interrupted_build_goes_on_with_the_same_batches(tmp_path):
    whole, first, second, seen = [], [], [], []
    build(tmp_path / "whole", counting(-1, whole))
    with pytest.raises(Stops):
        build(tmp_path / "c", counting(3, first))
    with pytest.raises(FileNotFoundError, match="must hold a finished cache"):
        TeacherCache.open(tmp_path / "c", KEY)
    cache = build(tmp_path / "c", counting(-1, second), progress=lambda *at: seen.append(at))
    assert first + second == whole and len(first) == 3 and len(second) == 2
    assert seen == [(20, 24), (24, 24)]
    assert torch.equal(everything(cache), expected())
    assert not (tmp_path / "c.partial").exists()
    again = []
    build(tmp_path / "c", counting(-1, again))
    assert again == []


def test_killed_build_leaves_only_rows_that_are_right(tmp_path, monkeypatch):
    monkeypatch.setattr("kdfast.chain.cache_files.FLUSH", 0.0)
    calls = []

    def dies(images):
        calls.append(images)
        if len(calls) == 4:
            os._exit(9)
        return table(images)

    child = os.fork()
    if child == 0:
        build(tmp_path / "c", dies)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    rest = []
    cache = build(tmp_path / "c", counting(-1, rest))
    assert len(rest) == 2
    assert torch.equal(everything(cache), expected())


def test_two_builders_do_not_mix(tmp_path):
    def meanwhile(images):
        with pytest.raises(BlockingIOError, match="being built by another process"):
            build(tmp_path / "c", table)
        return table(images)

    assert torch.equal(everything(build(tmp_path / "c", meanwhile)), expected())


def test_stale_cache_is_never_used(tmp_path, digits):
    teacher = Net().eval()
    key = teacher_key(teacher, digits.facts, normalise=[0.5])
    build(tmp_path / "c", table, key=key)
    TeacherCache.open(tmp_path / "c", key)
    with torch.no_grad():
        teacher.head.bias[3] += 1e-3
    changed = teacher_key(teacher, digits.facts, normalise=[0.5])
    with pytest.raises(ValueError, match=r"differs in teacher \(cached '\w+', now '\w+'\); build"):
        TeacherCache.open(tmp_path / "c", changed)
    with pytest.raises(ValueError, match=r"differs in normalise \(cached \[0.5\], now None\)"):
        TeacherCache.open(tmp_path / "c", teacher_key(Net(), {}) | {**key, "normalise": None})
    for name, value in (("size", 16), ("seed", 1), ("variants", 3), ("augmentation", "none")):
        other = key | {f"data: {name}": value}
        with pytest.raises(ValueError, match=f"differs in data: {name} "):
            build(tmp_path / "c", table, key=other)
    with pytest.raises(ValueError, match="differs in dtype .cached 'float32', now 'float16'"):
        build(tmp_path / "c", table, key=key, dtype="float16")
    cache = build(tmp_path / "c", lambda x: -table(x), key=changed, rebuild=True)
    assert torch.equal(everything(cache), -expected())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_unfinished_cache_of_another_key_is_not_continued(tmp_path):
    with pytest.raises(Stops):
        build(tmp_path / "c", counting(3, []))
    calls = []
    cache = build(tmp_path / "c", counting(-1, calls), key=KEY | {"teacher": "other"})
    assert len(calls) == 5 and torch.equal(everything(cache), expected())


def test_key_follows_from_all_facts_of_the_data(digits):
    one = digits.key
    assert build_classification("digits", size=8, seed=0, variants=2).key == one
    for options in ({"size": 9}, {"seed": 1}, {"variants": 3}, {"augment": "none"}):
        other = build_classification("digits", **{"size": 8, "seed": 0, "variants": 2} | options)
        assert other.key != one, options


def test_model_hash_sees_weights_buffers_and_settings():
    torch.manual_seed(0)
    net = Net()
    one = model_hash(net)
    net.eval().requires_grad_(False)
    assert model_hash(net) == one
    net.body[2].running_mean[0] += 1
    two = model_hash(net)
    net.heads = 4
    three = model_hash(net)
    net.body[3] = nn.GELU()
    four = model_hash(net)
    net.head.weight.data[0, 0] += 1
    assert len({one, two, three, four, model_hash(net)}) == 5


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="dtype: must be one of .*bfloat16"):
        build(tmp_path / "a", table, dtype="bfloat16")
    with pytest.raises(ValueError, match="top_k: must be 1 or more, got 0"):
        build(tmp_path / "a", table, top_k=0)
    with pytest.raises(ValueError, match="temperature: must be above 0"):
        build(tmp_path / "a", table, temperature=0.0)
    with pytest.raises(ValueError, match="batch_size: must be 1 or more, got 0"):
        build(tmp_path / "a", table, batch_size=0)
    with pytest.raises(ValueError, match=r"logits must be \(5, C\), got \(5,\)"):
        build(tmp_path / "a", lambda x: table(x)[:, 0])
    with pytest.raises(ValueError, match="2 rows that are not, the first of index 3, variant 0"):
        build(tmp_path / "a", lambda x: table(x) / (x[:, :1] < 3).float())
    with pytest.raises(ValueError, match="float16 holds logits up to 65504 below"):
        build(tmp_path / "b", lambda x: 1e4 * table(x), dtype="float16")
    cache = build(tmp_path / "c", table)
    with pytest.raises(IndexError, match=r"index: must be in \[0, 12\), got -1 to 3"):
        cache.logits([3, -1], 0)
    with pytest.raises(IndexError, match=r"variant: must be in \[0, 2\), got 2 to 2"):
        cache.logits([3], 2)


def test_broken_files_are_named(tmp_path):
    build(tmp_path / "c", table)
    values = tmp_path / "c" / "values.npy"
    values.write_bytes(values.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"values.npy is broken"):
        TeacherCache.open(tmp_path / "c", KEY)
    (tmp_path / "c" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"meta.json is broken"):
        TeacherCache.open(tmp_path / "c", KEY)
    build(tmp_path / "c", table, rebuild=True)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "precious.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="must hold a finished cache"):
        build(other, table, rebuild=True)
    assert (other / "precious.txt").exists()


def test_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"values.npy needs 608 bytes, .* No space left"):
            build(tmp_path / "c", table)
    assert torch.equal(everything(build(tmp_path / "c", table)), expected())


def test_processes_open_the_files_themselves(tmp_path):
    import pickle

    cache = build(tmp_path / "c", table)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert torch.equal(everything(pickle.loads(data)), expected())
    assert isinstance(cache.directory, Path)
