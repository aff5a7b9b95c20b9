# SPDX-License-Identifier: Apache-2.0
"""Trained weights: from the cache without a question, and one line without a network."""

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from kdfast.chain.planning import check_links
from kdfast.configs import ChainConfig, ConfigError, load
from kdfast.resolve import SourceError, load_model, trained

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """No network and empty caches; the hosts that were asked for."""
    hosts: list[str] = []

    def no_network(request: Any, timeout: float) -> None:
        hosts.append(request.full_url)
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(trained, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return hosts


@pytest.mark.parametrize(
    ("name", "host"),
    [(NAME, "https://huggingface.co"), ("torchvision:vit_b_16", "https://download.pytorch.org")],
)
def test_one_line_without_a_network(name: str, host: str, asked: list[str]) -> None:
    with pytest.raises(SourceError) as caught:
        load_model(name, pretrained=True)
    text = str(caught.value)
    assert asked == [host] and "\n" not in text
    assert text.startswith(f"--model: trained weights of {name} are not in the cache, and ")
    assert "cannot be reached (Name or service not known); name a file of weights" in text


def test_a_chain_says_so_before_its_first_step(asked: list[str]) -> None:
    config = load("vit_chain_digits", ["init=pretrained", f"chain=[{NAME},{NAME}]"])
    assert isinstance(config, ChainConfig)
    with pytest.raises(ConfigError, match="init: teacher: trained weights of .* cannot be reached"):
        check_links(config, 10)


def test_offline_is_not_asked(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set"):
        load_model(NAME, pretrained=True)
    assert not asked


def test_a_host_that_refuses_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(request: Any, timeout: float) -> None:
        raise urllib.error.HTTPError(request.full_url, 405, "no HEAD", None, None)  # type: ignore

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(trained, "try_to_load_from_cache", lambda *_: None)
    assert trained.find_trained(NAME, "--model") is None


def test_the_cache_is_taken_without_a_network(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    model = timm.create_model(NAME)
    with torch.no_grad():
        model.cls_token.fill_(3.0)  # type: ignore[operator,union-attr]
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    monkeypatch.setattr(trained, "try_to_load_from_cache", lambda *_: str(path))
    found: Any = load_model(NAME, pretrained=True)
    assert not asked and (found.cls_token == 3).all()
    other: Any = load_model(NAME, pretrained=True, classes=7)
    assert other.head.out_features == 7 and (other.cls_token == 3).all()


def test_torchvision_has_a_cache_of_its_own(asked: list[str], tmp_path: Path) -> None:
    file = tmp_path / "hub" / "checkpoints" / "vit_b_16-c867db91.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert trained.find_trained("torchvision:vit_b_16", "--model") is None
    assert not asked
