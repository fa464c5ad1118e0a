"""A latent cache on the disk: what is where, what is found out about damage, and what training is told."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tiny
import torch
from orientations import forget_upright, lay_down
from PIL import Image
from safetensors.torch import load_file, save

from mar.checkpoint import files
from mar.checkpoint.files import CheckpointError
from mar.config import ConfigError
from mar.data import latent_cache
from mar.data.cache_writer import describe_cache, finish_cache, prepare_cache, write_shards
from mar.data.images import Source, Transform, UnreadableImage, source_digest
from mar.data.latent_cache import (
    FORMAT,
    INDEX,
    MANIFEST,
    DamagedCache,
    LatentSource,
    open_shard,
    read_manifest,
    verify,
    write_index,
)
from mar.data.loader import batches
from mar.data.sources import open_data, open_source
from mar.tokenizer import PixelTokenizer
from mar.tokenizer.base import LatentMoments, Posterior, fingerprint, measure_latents, measure_moments, to_posterior

CPU = torch.device("cpu")


class Blurry(PixelTokenizer):
    """Pixels with a standard deviation that depends on them, so that there are log-variances."""

    deterministic = False
    factor = 1.0

    def config(self) -> dict[str, Any]:
        return {**super().config(), "kind": "blurry"}

    def encode(self, images: torch.Tensor) -> Posterior:
        raw = images * self.factor
        return Posterior(self.normalize(raw), torch.exp(images - 3) / self.std.view(-1, 1, 1))


def made(pictures: Path, out: Path, tokenizer: PixelTokenizer | None = None, **settings: Any) -> LatentSource:
    source = open_source(pictures)
    tokenizer = tokenizer or Blurry(1)
    options = {"size": (8, 8), "dtype": "fp32", "shard": 6, "data": "the pictures", "tokenizer_name": "blurry"}
    about = describe_cache(source, tokenizer, **{**options, **settings})
    shards = prepare_cache(out, about)
    if shards is not None:
        write_shards(out, about, source, tokenizer, shards, device=CPU, batch=4)
        finish_cache(out, about)
    return LatentSource(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def cache(data: Path, tmp_path: Path) -> Path:
    made(data, tmp_path / "cache")
    return tmp_path / "cache"


def pixels(source: Source, index: int) -> torch.Tensor:
    return Transform((8, 8), 1)(source[index].image)


def test_cache_image_order_follows_numbers(data: Path, cache: Path) -> None:
    found, source = open_data(cache), open_source(data)
    assert isinstance(found, LatentSource)
    assert len(found) == len(source) == 20
    shards = [f"0000{k}.safetensors" for k in range(4)]
    assert sorted(path.name for path in cache.iterdir()) == [*shards, MANIFEST, INDEX]
    assert (found.classes, found.flips) == (("across", "down"), True)
    for i in (0, 5, 6, 11, 19):
        for flip in (False, True):
            moments, label = found.read(i, flip)
            image = pixels(source, i).flip(-1) if flip else pixels(source, i)
            assert torch.equal(moments[0], image)
            torch.testing.assert_close(moments[1], 2 * (image - 3), rtol=1e-6, atol=0)
            assert label == source[i].label
    assert torch.cat([part.mean for part in found.in_order()]).shape == (20, 1, 8, 8)
    assert sum(len(part.mean) for part in found.in_order(limit=7)) == 7


def test_cache_knows_the_labels_of_its_images_and_parts(cache: Path) -> None:
    found = LatentSource(cache)
    assert found.labels.tolist() == [found.read(index, False)[1] for index in range(20)]
    assert found.subset(np.array([19, 0, 7])).labels.tolist() == found.labels[[19, 0, 7]].tolist()


def test_cache_counts_an_unreadable_image_for_the_one_that_is_read_for_it(tmp_path: Path) -> None:
    """As a class of its own, it would be shown as often as a class by `--balance`."""
    pictures = tiny.write_images(tmp_path / "pictures")
    files = [Path(open_source(pictures)[number].name) for number in (3, 19)]
    for file in files:
        file.write_bytes(b"no picture")
    found = made(pictures, tmp_path / "cache")
    assert sorted(found.index.skipped) == [3, 19]
    expected = open_source(pictures).labels.tolist()
    assert found.labels[:19].tolist() == expected[:19]
    assert found.labels[19] == expected[0]  # after the last comes the first
    assert found.subset(np.array([19, 5, 12])).labels.tolist() == [expected[5], expected[5], expected[12]]


def test_shards_are_plain_safetensors(cache: Path) -> None:
    tensors = load_file(cache / "00003.safetensors")
    assert tensors["moments"].shape == (2, 2, 2, 1, 8, 8)
    assert tensors["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_cache_size_per_image_is_as_stated(dtype: str, error: float, data: Path, tmp_path: Path) -> None:
    exact, stored = made(data, tmp_path / "a"), made(data, tmp_path / "b", dtype=dtype)
    for i in range(20):
        (a, _), (b, _) = exact.read(i, i % 2 == 0), stored.read(i, i % 2 == 0)
        assert ((a - b).abs() <= error * a.abs()).all()
    assert stored.manifest.image_bytes() == 2 * 2 * 64 * (4 if dtype == "fp32" else 2) + 4


def test_cache_imagenet_image_is_half_the_references_size(cache: Path) -> None:
    """KL-16 at 256x256: 64 KiB and the headers of npz there; 32 KiB here, and 4 bytes for its label."""
    about = read_manifest(cache)
    assert type(about)(**{**vars(about), "shape": (16, 16, 16), "dtype": "fp16"}).image_bytes() == 32 * 1024 + 4


def test_cache_deterministic_tokenizer_stores_means_only(data: Path, tmp_path: Path) -> None:
    found = made(data, tmp_path / "cache", PixelTokenizer(1), flip=False)
    assert found.read(3, False)[0].shape == (1, 1, 8, 8)
    assert next(found.in_order()).logvar is None
    with pytest.raises(ConfigError, match="holds no flipped pictures"):
        found.read(3, True)


def test_cache_with_shift_is_refused(cache: Path) -> None:
    with pytest.raises(ConfigError, match="cache holds latents, which can't be moved; train with --shift 0"):
        next(batches(LatentSource(cache), Transform((8, 8), 1), batch=8, seed=0, shift=1))


def test_cache_of_lying_pictures_is_that_of_upright_ones(data: Path, tmp_path: Path) -> None:
    lying = lay_down(tiny.write_images(tmp_path / "lying"))
    caches = {told: made(lying, tmp_path / str(told), upright=told) for told in (True, False)}
    expected = made(data, tmp_path / "plain")
    assert [caches[told].manifest.upright for told in (True, False)] == [True, False]
    for index in range(20):
        assert torch.equal(caches[True].read(index, True)[0], expected.read(index, True)[0])
    (lying_moments, moments) = (torch.cat([m.mean for m in cache.in_order()]) for cache in (caches[False], expected))
    assert (lying_moments != moments).flatten(1).any(1).sum() > 10
    with pytest.raises(ConfigError, match=r"was begun with upright False, not True; give the same settings") as said:
        made(lying, tmp_path / "False", upright=True)
    assert "\n" not in str(said.value)


def test_cache_of_an_earlier_version_is_not_upright(data: Path, cache: Path) -> None:
    forget_upright(cache / MANIFEST)
    assert LatentSource(cache).manifest.upright is False
    assert verify(cache).manifest == LatentSource(cache).manifest
    before = (cache / MANIFEST).read_bytes()
    (cache / "00001.safetensors").unlink()
    assert len(made(data, cache)) == 20
    assert (cache / MANIFEST).read_bytes() == before


def test_cache_is_independent_of_statistics(data: Path, tmp_path: Path) -> None:
    made(data, tmp_path / "a")
    measured = Blurry(1)
    measured.set_statistics(0.3, 0.7)
    made(data, tmp_path / "b", measured)
    for k in range(4):
        assert (tmp_path / f"a/0000{k}.safetensors").read_bytes() == (tmp_path / f"b/0000{k}.safetensors").read_bytes()
    source = open_source(data)
    every = torch.stack([pixels(source, i) for i in range(20)])
    from_pictures, from_cache = (
        measure_latents(Blurry(1), [every]),
        measure_moments(LatentSource(tmp_path / "a").in_order()),
    )
    assert from_cache.images == from_pictures.images
    assert (*from_cache.mean, *from_cache.std) == pytest.approx((*from_pictures.mean, *from_pictures.std), rel=1e-6)
    posterior = to_posterior(measured, LatentMoments(every, 2 * (every - 3)))
    wanted = measured.encode(every)
    torch.testing.assert_close(posterior.mean, wanted.mean)
    torch.testing.assert_close(posterior.std, wanted.std)


def test_tokenizer_fingerprint_ignores_statistics() -> None:
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    tokenizer = Blurry(1)
    plain = fingerprint(tokenizer)
    tokenizer.set_statistics(1.0, 2.0)
    assert fingerprint(tokenizer) == plain != fingerprint(Blurry(3))
    tokenizer.layer = one
    with_one = fingerprint(tokenizer)
    tokenizer.layer = other
    assert len({plain, with_one, fingerprint(tokenizer)}) == 3


def test_loader_from_cache_matches_images(data: Path, cache: Path) -> None:
    """With broken pictures replaced by the same ones, and by workers, which map the files themselves."""
    found = pickle.loads(pickle.dumps(LatentSource(cache)))
    settings: dict[str, Any] = {"batch": 8, "seed": 3, "start": 5}
    transform = Transform((8, 8), 1)
    images = batches(open_source(data), transform, **settings)
    for workers in (0, 2):
        moments = batches(found, transform, workers=workers, **settings)
        for _, a, b in zip(range(4), images, moments, strict=False):
            assert torch.equal(a.images, b.moments.mean)
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.positions, b.positions)
        images = batches(open_source(data), transform, **settings)


def test_cache_unreadable_images_keep_their_numbers(tmp_path: Path) -> None:
    data = tiny.write_images(tmp_path / "pictures")
    (data / "across" / "7.png").write_bytes(b"no picture")
    found, source = made(data, tmp_path / "cache"), open_source(data)
    [(number, name)] = found.index.skipped.items()
    assert name.endswith("7.png")
    with pytest.raises(UnreadableImage, match=r"7\.png"):
        found.read(number, False)
    assert torch.equal(found.read(number + 1, False)[0][0], pixels(source, number + 1))
    assert sum(len(part.mean) for part in found.in_order()) == 19
    a, b = (next(batches(x, Transform((8, 8), 1), batch=20, seed=0)) for x in (source, found))
    assert len(a.skipped) == 1
    assert a.skipped == b.skipped
    assert torch.equal(a.images, b.moments.mean)
    assert verify(tmp_path / "cache").index.skipped == found.index.skipped


def test_cache_without_readable_images_is_refused(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 5 pictures of the pictures can be read"):
        made(tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache" / INDEX).exists()


def test_cache_verify_finds_a_flipped_bit(cache: Path) -> None:
    heard: list[float] = []
    verify(cache, heard.append)
    assert heard == [6, 12, 18, 20]
    generator = np.random.default_rng(0)
    for path in sorted(cache.iterdir()):
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
        places = {*generator.integers(0, header, 25).tolist(), *generator.integers(0, len(whole), 25).tolist()}
        for place in (*places, len(whole) - 1):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(ConfigError) as said:
                verify(cache)
            assert path.name in str(said.value), (path, place)
            assert "\n" not in str(said.value)
        path.write_bytes(whole)
    verify(cache)


@pytest.mark.parametrize("earlier", [False, True], ids=["crc32", "sha256"])
def test_cache_flipped_bit_is_not_learned(
    cache: Path, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:  # as before pictures had checksums of their own
        manifest = read_manifest(cache)
        for number in range(manifest.shards):
            path = cache / manifest.file(number)
            shard = open_shard(path, manifest, number)
            note = {"format": FORMAT, "sha256": shard.sha256, "skipped": {}}
            path.write_bytes(save({"moments": shard.moments, "labels": shard.labels}, {"mar": json.dumps(note)}))
        write_index(cache, manifest)
    whole = LatentSource(cache)
    expected = [whole.read(i, flip) for i in range(len(whole)) for flip in (False, True)]
    path = cache / "00002.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in np.random.default_rng(1).integers(header, len(data), 30).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        damaged = LatentSource(cache)
        with pytest.raises(DamagedCache, match=r"00002\.safetensors is damaged: picture 1\d is not as it was written"):
            [damaged.read(i, flip) for i in range(len(damaged)) for flip in (False, True)]
        with pytest.raises(DamagedCache, match="is not as it was written"):
            list(LatentSource(cache).in_order())
    monkeypatch.setenv("MAR_CHECKSUMS", "off")
    assert len(list(LatentSource(cache).in_order())) == 4
    monkeypatch.undo()
    path.write_bytes(data)
    again = LatentSource(cache)
    read = [again.read(i, flip) for i in range(len(again)) for flip in (False, True)]
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(read, expected, strict=True))


@pytest.mark.parametrize("name", ["../00000.safetensors", "/etc/passwd", "00001.safetensors", 3, None])
def test_cache_index_of_other_files_is_refused(cache: Path, name: Any) -> None:
    content = json.loads((cache / INDEX).read_text("utf-8"))["content"]
    content["shards"][0]["file"] = name
    latent_cache._write_sealed(cache / INDEX, content)
    with pytest.raises(DamagedCache, match=r"names .*, expected 00000\.safetensors"):
        LatentSource(cache)


@pytest.mark.parametrize(
    "changes", [{"pictures": "20"}, {"shape": [1, 2]}, {"size": 8}, {"flips": None}, {"shape": [0, 1, 1]}, {"parts": 7}]
)
def test_cache_manifest_of_other_types_is_refused(cache: Path, changes: dict[str, Any]) -> None:
    content = json.loads((cache / "cache.json").read_text("utf-8"))["content"]
    latent_cache._write_sealed(cache / "cache.json", content | changes)
    with pytest.raises(DamagedCache, match="can't be understood"):
        LatentSource(cache)


def test_cache_damaged_shards_alone_are_rebuilt(data: Path, cache: Path) -> None:
    before, when = processes.read_tree(cache), {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    short = cache / "00001.safetensors"
    short.write_bytes(short.read_bytes()[:-100])
    with pytest.raises(DamagedCache, match=r"00001\.safetensors has .* bytes instead of"):
        LatentSource(cache)
    with pytest.raises(DamagedCache, match=r"00001\.safetensors is cut short: .*; delete it .* run the `mar cache`"):
        made(data, cache)
    with pytest.raises(DamagedCache, match=r"1 of 4 shards are damaged: 00001\.safetensors;"):
        verify(cache)
    short.unlink()
    with pytest.raises(DamagedCache, match=r"00001\.safetensors is missing"):
        open_data(cache)
    made(data, cache)
    assert processes.read_tree(cache) == before
    touched = {path.name for path in cache.iterdir() if path.stat().st_mtime_ns != when[path.name]}
    assert touched == {"00001.safetensors", INDEX}


def test_cache_lost_index_is_rebuilt(data: Path, cache: Path) -> None:
    whole = (cache / INDEX).read_bytes()
    (cache / INDEX).unlink()
    with pytest.raises(ConfigError, match=r"not finished \(4 of 4 shards\)"):
        LatentSource(cache)
    made(data, cache)
    assert (cache / INDEX).read_bytes() == whole


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": (4, 4)}, r"size \[8, 8\], not \[4, 4\]"),
        ({"dtype": "bf16"}, "dtype fp32, not bf16"),
        ({"flip": False}, "flips True, not False"),
        ({"shard": 7}, "shard 6, not 7"),
        ({"tokenizer": PixelTokenizer(1)}, r"another tokenizer \(blurry\)"),
    ],
    ids=["size", "dtype", "flip", "shard", "tokenizer"],
)
def test_cache_with_other_settings_is_refused(settings: dict[str, Any], words: str, data: Path, cache: Path) -> None:
    before = processes.read_tree(cache)
    with pytest.raises(ConfigError, match=f"was begun with .*{words}"):
        made(data, cache, **settings)
    assert processes.read_tree(cache) == before


def test_cache_of_other_images_is_refused(tmp_path: Path) -> None:
    data = tiny.write_images(tmp_path / "pictures")
    made(data, tmp_path / "cache")
    moved = data.rename(tmp_path / "moved")
    made(moved, tmp_path / "cache", data="elsewhere")  # the same pictures
    Image.new("L", (9, 9)).save(moved / "down" / "0.png")
    with pytest.raises(ConfigError, match=r"pictures that have changed since \(the pictures\)"):
        made(moved, tmp_path / "cache")


def test_table_digest_follows_images_and_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from mar.data.parquet import TableSource

    def table(values: list[int], labels: list[int]) -> TableSource:
        pictures = [Image.new("L", (4 + value, 4), value) for value in values]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        return TableSource(datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features), "t")

    same = source_digest(table([1, 20], [0, 1]))
    assert source_digest(table([1, 20], [0, 1])) == same
    assert len({same, source_digest(table([1, 20], [1, 1])), source_digest(table([20, 1], [0, 1]))}) == 3


def test_bundled_digests_are_stable() -> None:
    assert source_digest(open_source("fashion")) != source_digest(open_source("fashion", "test"))


def test_cache_latents_out_of_range_are_refused(data: Path, tmp_path: Path) -> None:
    large = Blurry(1)
    large.factor = 1e5
    with pytest.raises(ValueError, match=r"the latents of .*\.png reach 1e\+05, but fp16 ends at 6\.55e\+04"):
        made(data, tmp_path / "a", large, dtype="fp16")
    made(data, tmp_path / "b", large, dtype="bf16")
    large.factor = float("nan")
    with pytest.raises(ValueError, match=r"the latents of .*\.png are not finite"):
        made(data, tmp_path / "c", large)


def test_cache_invalid_labels_are_refused(data: Path, tmp_path: Path) -> None:
    class Wrong:
        classes, flips = ("a", "b"), True

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            example = source[index]
            return type(example)(example.image, 5, "it")

    source, tokenizer = open_source(data), Blurry(1)
    about = describe_cache(Wrong(), tokenizer, data="x", tokenizer_name="blurry", size=(8, 8))
    with pytest.raises(ValueError, match="it has the label 5, but there are 2 classes"):
        write_shards(tmp_path, about, Wrong(), tokenizer, prepare_cache(tmp_path, about) or [], device=CPU)


def test_cache_into_another_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.txt is there, but not from `mar cache`"):
        made(data, tmp_path)
    with pytest.raises(ConfigError, match="is a file, but a cache is a folder"):
        made(data, tmp_path / "mine.txt")
    tokenizer = Blurry(1)
    tokenizer.stride = 2
    with pytest.raises(ConfigError, match="5x8, expected multiples of the stride 2"):
        made(data, tmp_path / "new", tokenizer, size=(5, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_cache_too_little_disk_fails_beforehand(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 20_000

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(CheckpointError, match=r"20\.1 KiB are needed, but only 19\.5 KiB are free"):
        made(data, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_cache_as_images_or_of_a_newer_format_is_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="holds cached latents, not pictures; those were in the pictures"):
        open_source(cache)
    sealed = json.loads((cache / MANIFEST).read_text())
    (cache / MANIFEST).write_text(json.dumps({**sealed, "format": "mar-latents/2"}))
    with pytest.raises(
        ConfigError, match=r"made by a newer mar: .* mar-latents/2, .* reads mar-latents/1; upgrade mar"
    ):
        open_data(cache)
