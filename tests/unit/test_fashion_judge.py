"""The judge of Fashion-MNIST pictures: its formulas against cases worked out by hand, its files against damage."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import fashion_judge as fj
from mar.assets import FASHION_CLASSES
from mar.evaluation.features import open_extractor


def random_split(count: int, seed: int) -> fj.Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return fj.Split(images, np.arange(count, dtype=np.int64) % 10)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def small_classifier() -> fj.Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fj.Classifier().eval()


def test_idx_file_round_trip_is_exact(tmp_path: Path) -> None:
    array = np.arange(2 * 3 * 300, dtype=np.int64).astype(np.uint8).reshape(2, 3, 300)  # 300: a size of two bytes
    write_idx(tmp_path / "a.gz", array)
    np.testing.assert_array_equal(fj.load_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\0\0\x08\x01\0\0\0\x05abc", "3 bytes of data"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "expected 000008xx"),
        (b"\0\0\x08\x03\0\0", "fetch the file again"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x03abc", mtime=0)[:-6], "gzip stream is damaged"),
    ],
)
def test_idx_damaged_file_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "broken.gz").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        fj.load_idx(tmp_path / "broken.gz")


def test_frechet_of_diagonal_gaussians() -> None:
    # With diagonal covariances it is |mu1 - mu2|^2 plus the sum of squared differences of standard deviations.
    mu1, mu2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    std1, std2 = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    expected = 5.0 + 1.0 + 0.0 + 6.25
    assert fj.frechet(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, abs=1e-12)


def test_frechet_agrees_with_the_eigenvalues_of_the_product() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) for _ in range(2)]
    (mu1, cov1), (mu2, cov2) = map(fj.statistics, sets)
    trace = np.sqrt(np.linalg.eigvals(cov1 @ cov2).real).sum()
    expected = np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2) - 2 * trace
    assert fj.frechet(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)
    assert fj.frechet(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_even_where_features_are_dead() -> None:
    found = np.random.default_rng(1).normal(size=(40, 128)) * 30  # fewer pictures than features: a singular covariance
    found[:, ::3] = 0
    mu, cov = fj.statistics(found)
    assert fj.frechet(mu, cov, mu, cov) <= 1e-8


def test_classifier_features_are_the_penultimate_layer() -> None:
    model, images = small_classifier(), random_split(7, 0).images
    found, logits = fj.features(model, images)
    assert found.shape == (7, fj.WIDTH)
    assert logits.shape == (7, 10)
    assert found.min() >= 0
    weight, bias = (p.detach().double().numpy() for p in (model.to_logits.weight, model.to_logits.bias))
    np.testing.assert_allclose(found @ weight.T + bias, logits, atol=1e-5)
    np.testing.assert_allclose(fj.features(model, images, batch=2)[0], found, atol=1e-5)


def test_classifier_file_round_trip_and_its_refusals(tmp_path: Path) -> None:
    model, images = small_classifier(), random_split(3, 0).images
    file = tmp_path / "c.safetensors"
    fj.save_classifier(model, file, {"test_accuracy": "0.1"})
    np.testing.assert_array_equal(fj.features(fj.load_classifier(file), images)[1], fj.features(model, images)[1])
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]

    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fj.load_classifier(file)
    fj.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="make one with the verb `train`"):
        fj.load_classifier(file)


def test_classifier_training_follows_its_seed_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(64, dtype=np.int64) % 2
    split = fj.Split(
        np.where(labels == 0, 0, 255).astype(np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8), labels
    )
    before = torch.get_rng_state()
    first, again, other = (fj.train(split, epochs=1, seed=seed, batch=16) for seed in (0, 0, 1))
    assert torch.equal(first.to_logits.weight, again.to_logits.weight)
    assert not torch.equal(first.to_logits.weight, other.to_logits.weight)
    assert fj.accuracy(fj.train(split, epochs=6, seed=0, batch=16), split) == 1.0
    assert torch.equal(torch.get_rng_state(), before)
    assert "epoch 6/6" in capsys.readouterr().out


def test_balanced_draw_has_equal_classes() -> None:
    labels = np.arange(100, dtype=np.int64) % 10
    index = fj.balanced(labels, 43, seed=0)
    assert len(set(index.tolist())) == 43
    assert sorted(np.bincount(labels[index]).tolist()) == [4] * 7 + [5] * 3
    assert set(index.tolist()) != set(fj.balanced(labels, 43, seed=1).tolist())
    with pytest.raises(ValueError, match="ask for fewer"):
        fj.balanced(labels, 101, seed=0)


def test_nearest_is_zero_for_a_copy_and_euclidean_otherwise() -> None:
    others = np.zeros((2, 28, 28), np.uint8)
    others[1] = 255
    images = np.zeros((3, 28, 28), np.uint8)
    images[1, :3, :3] = 255  # nine white pixels: 3 away from black
    images[2] = 255
    np.testing.assert_allclose(fj.nearest(images, others, batch=2), [0, 3, 0], atol=1e-6)


def test_judge_tells_copies_from_others_and_wrong_classes_from_right_ones() -> None:
    training, test = random_split(60, 1), random_split(80, 2)
    reference = fj.Reference(small_classifier(), training, test, training.images)
    said = fj.features(reference.model, training.images)[1].argmax(1)

    copies = fj.judge(training.images[:20], said[:20], reference)
    assert copies.agreement == 1.0
    assert (copies.nearest_median, copies.closer) == (0.0, 1.0)
    assert copies.real_nearest_5 > 1
    assert len(copies.real_distances) == fj.DRAWS

    wrong = fj.judge(
        test.images[:20], (fj.features(reference.model, test.images[:20])[1].argmax(1) + 1) % 10, reference
    )
    assert wrong.agreement == 0.0
    assert wrong.closer <= 0.1
    assert "MISSED: at least 90%" in wrong.text()

    same = fj.judge(test.images, said[np.arange(80) % 60], fj.Reference(reference.model, test, test, training.images))
    assert same.distance <= 1e-8
    assert same.row().startswith("n 80 | agreement")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 28, 28), np.float32), np.zeros(2, np.int64), "images are float32"),
        (np.zeros((2, 32, 32), np.uint8), np.zeros(2, np.int64), r"expected uint8 \(n, 28, 28\)"),
        (np.zeros((2, 28, 28), np.uint8), np.zeros(3, np.int64), r"labels are int64 \(3,\)"),
        (np.zeros((2, 28, 28), np.uint8), np.array([0, 10]), "labels span 0 to 10"),
    ],
)
def test_classifier_wrong_images_are_refused(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fj.Split(images, labels)


def test_images_from_npz_or_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = random_split(4, 0)
    np.savez(tmp_path / "good.npz", images=split.images, labels=split.labels.astype(np.uint8))
    read = fj.load_pictures(tmp_path / "good.npz")
    np.testing.assert_array_equal(read.images, split.images)
    assert read.labels.dtype == np.int64

    np.savez(tmp_path / "bad.npz", pictures=split.images)
    arguments = ["--data", str(tmp_path), "--classifier", "none", "judge", str(tmp_path / "bad.npz")]
    assert fj.main(arguments) == 2
    error = capsys.readouterr().err
    assert "expected an .npz with the arrays" in error
    assert error.count("\n") == 1


def test_classifier_works_as_an_extractor(tmp_path: Path) -> None:
    model, images = small_classifier(), random_split(5, 0).images
    fj.save_classifier(model, tmp_path / "c.safetensors", {})
    judge = open_extractor(f"{fj.__file__}:extractor", tmp_path / "c.safetensors")
    assert (judge.metric, judge.width, judge.scores) == ("FD (fashion-judge)", fj.WIDTH, False)
    assert judge.classes == FASHION_CLASSES == fj.CLASSES

    gray = torch.from_numpy(images)[:, None]
    found = judge(gray.expand(-1, 3, -1, -1))  # as a folder of RGB files would give them
    values, logits = fj.features(model, images)
    np.testing.assert_allclose(found.values.numpy(), values, atol=1e-6)
    assert found.logits is not None
    np.testing.assert_allclose(found.logits.numpy(), logits, atol=1e-6)
    assert torch.equal(judge(gray).values, found.values)


def test_classifier_as_extractor_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --weights FILE"):
        open_extractor(f"{fj.__file__}:extractor")
    fj.save_classifier(small_classifier(), tmp_path / "c.safetensors", {})
    with pytest.raises(ValueError, match=r"pictures of \(32, 32\), expected 28 x 28"):
        fj.extractor(tmp_path / "c.safetensors")(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
