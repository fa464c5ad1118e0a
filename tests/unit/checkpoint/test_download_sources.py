"""Files with several sources, and files of the Hub: its listing gives sizes, hashes and names."""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub, serve_hub

from mar.checkpoint.download import DownloadError, RemoteFile, fetch, hub_url, missing, needed


def archive(seed: int = 0) -> bytes:
    """Something with the outer form of a file of torch.save."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr("data/0", random.Random(seed).randbytes(100_000))
    return memory.getvalue()


GOOD = archive()
DOWN = "http://127.0.0.1:9/elsewhere"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url + "/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield served


def get(remote: RemoteFile, folder: Path, **options: Any) -> Path:
    return fetch(remote, folder, **{"wait": lambda seconds: None, "attempts": 2, "timeout": 5.0} | options)


def test_fetch_first_source_down_takes_the_second(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/name/a.pth", GOOD)
    sha256 = hashlib.sha256(GOOD).hexdigest()
    remote = RemoteFile("a.pth", DOWN, sha256=sha256, size=len(GOOD), others=("hf://owner/name@abc/a.pth",))
    assert get(remote, tmp_path).read_bytes() == GOOD
    assert hub.asked[-1] == "/owner/name/resolve/abc/a.pth"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth"}


def test_fetch_wrong_bytes_of_the_first_source_takes_the_second(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/bad/a.pth", archive(1))
    hub.put("hf://owner/name/a.pth", GOOD)
    sha256 = hashlib.sha256(GOOD).hexdigest()
    remote = RemoteFile("a.pth", "hf://owner/bad/a.pth", sha256=sha256, others=("hf://owner/name/a.pth",))
    hub.lists = False
    assert get(remote, tmp_path).read_bytes() == GOOD


def test_fetch_all_sources_failed_names_each(hub: LocalHub, tmp_path: Path) -> None:
    remote = RemoteFile("a.pth", DOWN, others=("hf://owner/name/a.pth",))
    with pytest.raises(DownloadError, match=r"could not download a\.pth from .*; could not download a\.pth: .* 404 "):
        get(remote, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_goes_on_with_the_source_that_began(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/name/a.pth", GOOD)
    hub.put("hf://owner/first/a.pth", GOOD)
    url = hub_url("hf://owner/name/a.pth")
    (tmp_path / "a.pth.part").write_bytes(GOOD[:5000])
    etag = f'"{hashlib.sha256(GOOD).hexdigest()}"'
    note = {"url": url, "validator": etag, "total": len(GOOD), "synced": 5000}
    (tmp_path / "a.pth.part.json").write_text(json.dumps(note))
    get(RemoteFile("a.pth", "hf://owner/first/a.pth", others=("hf://owner/name/a.pth",)), tmp_path)
    assert hub.asked == ["/api/models/owner/name/tree/main", "/owner/name/resolve/main/a.pth"]


def test_fetch_of_the_hub_compares_the_listed_sha256(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/name/a.pth", GOOD)
    hub.wrong_hashes = True
    with pytest.raises(DownloadError, match=r"a\.pth has the SHA-256 .*, expected 0{64}: it was not kept"):
        get(RemoteFile("a.pth", "hf://owner/name/a.pth"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    hub.wrong_hashes = False
    assert get(RemoteFile("folder/b.pth", "hf://owner/name/a.pth"), tmp_path) == tmp_path / "folder/b.pth"
    assert (tmp_path / "folder/b.pth").read_bytes() == GOOD


@pytest.mark.parametrize("lists", [True, False])
def test_fetch_of_the_hub_without_a_listing_takes_the_path(hub: LocalHub, tmp_path: Path, lists: bool) -> None:
    hub.put("hf://owner/name/in/a.pth", GOOD)
    hub.lists = lists
    assert get(RemoteFile("a.pth", "hf://owner/name/in/a.pth"), tmp_path).read_bytes() == GOOD


def test_fetch_of_the_hub_unseen_path_is_found_by_its_pattern(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/name/checkpoints/eMIGM_small_256.pth", GOOD)
    hub.put("hf://owner/name/checkpoints/eMIGM_xsmall_256.pth", archive(1))
    pattern = r"(?i).*emigm[_-]small[_-]256.*\.pth"
    remote = RemoteFile("emigm-small.pth", "hf://owner/name/eMIGM_small_256_checkpoint.pth", pattern=pattern)
    assert get(remote, tmp_path).read_bytes() == GOOD
    hub.put("hf://owner/name/old/eMIGM_small_256.pth", archive(2))
    with pytest.raises(DownloadError, match=r"owner/name on the Hub has no eMIGM_small_256_checkpoint\.pth; it has "):
        get(remote, tmp_path / "other")


def test_fetch_mirror_replaces_all_sources(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/name/a.pth", GOOD)
    remote = RemoteFile("a.pth", DOWN, others=("hf://owner/name/a.pth",))
    with pytest.raises(DownloadError, match="could not download"):
        get(remote, tmp_path / "to", mirror="http://127.0.0.1:9")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"x" * 100, "its header is cut off, or is none"),
        ((10).to_bytes(8, "little") + b"[]" + b" " * 8, "its header is none of a safetensors file"),
        ((70).to_bytes(8, "little") + json.dumps({"a": {"data_offsets": [0, 9]}}).encode().ljust(70) + b"12345", "87"),
    ],
    ids=["no header", "other header", "cut off"],
)
def test_fetch_damaged_safetensors_is_refused(hub: LocalHub, tmp_path: Path, content: bytes, reason: str) -> None:
    hub.put("hf://owner/name/a.safetensors", content)
    with pytest.raises(DownloadError, match=rf"a\.safetensors is damaged \(.*{reason}"):
        get(RemoteFile("a.safetensors", "hf://owner/name/a.safetensors"), tmp_path)


def test_fetch_exact_size_is_compared_before_the_first_byte(hub: LocalHub, tmp_path: Path) -> None:
    hub.put("hf://owner/name/a.pth", GOOD)
    hub.lists = False
    remote = RemoteFile("a.pth", "hf://owner/name/a.pth", size=len(GOOD) + 1)
    with pytest.raises(DownloadError, match=f"has {len(GOOD):,} bytes, expected {len(GOOD) + 1:,}: nothing was kept"):
        get(remote, tmp_path)


def test_needed_files_are_the_models_and_its_tokenizers(tmp_path: Path) -> None:
    assert [remote.name for remote in needed("detok-base")] == [
        "detok/detok-BB-gamm3.0-m0.7-decoder_tuned.pth", "detok/stats.pkl", "detok-base.pth",
    ]  # fmt: skip
    (tmp_path / "detok").mkdir()
    (tmp_path / "detok/stats.pkl").touch()
    assert [remote.name for remote in missing("detok", tmp_path)] == ["detok/detok-BB-gamm3.0-m0.7-decoder_tuned.pth"]
    assert len(missing("emigm-xs-512", tmp_path)) == 3
    (tmp_path / "emigm-xs-512.safetensors").touch()
    assert missing("emigm-xs-512", tmp_path) == []
