"""An independent classifier of Fashion-MNIST: class agreement and Fréchet distance of generated images.

    python benchmarks/fashion_judge.py --data PATH train --out classifier.safetensors
    python benchmarks/fashion_judge.py --data PATH --classifier FILE judge PICTURES.npz
    python benchmarks/fashion_judge.py --data PATH --classifier FILE model [CHECKPOINT]

PATH is a folder with the four gzipped IDX files of Fashion-MNIST (github.com/zalandoresearch/fashion-mnist).

The classifier is a small CNN, trained on all 60,000 training images; the generator never uses it. The Fréchet distance
is of its 128 features after the last ReLU. Distances compare only within one classifier. The result is therefore a
ratio: to the distance of as many real training images.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from mar.evaluation.features import ModuleExtractor

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SIDE = 28  # pixels along an edge
WIDTH = 128  # features of the penultimate layer
KIND = "fashion-judge/1"  # architecture, in the header of weight files
AGREEMENT, WORST_CLASS, RATIO = 0.90, 0.75, 6.0  # targets of the bundled model
DRAWS = 5  # subsets of real training images, for the spread of their distance
IDX_UBYTE = 8  # the IDX format's code for unsigned bytes

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]


def load_idx(path: str | Path) -> Bytes:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Format: two zero bytes, type, rank, big-endian sizes, data. Raises ValueError for a wrong header or length.
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: the gzip stream is damaged ({error}); fetch the file again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != IDX_UBYTE:
        raise ValueError(f"{path}: starts with {raw[:4].hex()}, expected 000008xx, an IDX file of unsigned bytes")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path}: ends after {len(raw)} bytes, expected a header of {start}; fetch the file again")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != int(np.prod(shape)):
        raise ValueError(f"{path}: {len(raw) - start} bytes of data, expected shape {shape}; fetch the file again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


@dataclass(frozen=True)
class Split:
    """Labeled images: images (n, 28, 28) uint8, labels (n,) int64 in 0..9."""

    images: Bytes
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"images are {self.images.dtype} {self.images.shape}, expected uint8 (n, {SIDE}, {SIDE})")
        if self.labels.shape != (len(self.images),) or self.labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels are {self.labels.dtype} {self.labels.shape}, expected integers ({len(self.images)},)"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(CLASSES):
            raise ValueError(
                f"labels span {self.labels.min()} to {self.labels.max()}, expected 0 to {len(CLASSES) - 1}"
            )


def load_split(data: Path, name: str) -> Split:
    """Read Fashion-MNIST from its files in `data`: name "train" (60,000 images) or "t10k" (10,000)."""
    images, labels = (data / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    return Split(load_idx(images), load_idx(labels).astype(np.int64))


class Classifier(nn.Module):
    """A small CNN, (n, 1, 28, 28) in [0, 1] -> (features (n, 128), not negative; logits (n, 10))."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        # Pooling before norm and ReLU saves three quarters of their work.
        self.blocks = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(128), nn.ReLU()),
        )
        self.to_features = nn.Linear(128 * 3 * 3, width)
        self.dropout = nn.Dropout(0.3)
        self.to_logits = nn.Linear(width, len(CLASSES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.to_features(self.blocks(pixels).flatten(1)))
        return features, self.to_logits(self.dropout(features))


def to_pixels(images: Bytes) -> Tensor:
    """Convert (n, 28, 28) uint8 to (n, 1, 28, 28) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float().div_(255).unsqueeze(1)


@torch.no_grad()
def features(model: Classifier, images: Bytes, batch: int = 500) -> tuple[Floats, Floats]:
    """Compute features (n, 128) and logits (n, 10), both float64, in eval mode."""
    model.eval()
    parts = [model(to_pixels(images[i : i + batch])) for i in range(0, len(images), batch)]
    values, logits = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
    return values, logits


def accuracy(model: Classifier, split: Split) -> float:
    """Compute the share of correctly classified images."""
    return float((features(model, split.images)[1].argmax(1) == split.labels).mean())


def train(split: Split, *, epochs: int, seed: int, batch: int = 128, lr: float = 3e-3) -> Classifier:
    """Train from `seed`; the same weights for the same seed, PyTorch build and thread count.

    AdamW under one cycle of the learning rate. No flips: all shoes of the data set face the same way.
    """
    steps = len(split.images) // batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
        labels = torch.from_numpy(split.labels)
        for epoch in range(epochs):
            started, total = time.perf_counter(), 0.0
            model.train()
            for index in torch.randperm(len(labels))[: steps * batch].view(steps, batch):
                pixels = to_pixels(split.images[index.numpy()]).to(memory_format=torch.channels_last)
                logits = model(pixels)[1]
                loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            print(
                f"epoch {epoch + 1}/{epochs}: loss {total / steps:.4f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return model.eval()


def save_classifier(model: Classifier, file: Path, header: dict[str, str]) -> None:
    """Write the weights as safetensors, with `header` (accuracy, seed, ...) readable without loading them."""
    partial = file.with_name(file.name + ".part")  # renamed when complete, so that a full disk leaves no partial file
    try:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, partial, {"kind": KIND, **header})
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_classifier(file: str | Path) -> Classifier:
    """Load a classifier that `train` stored, in eval mode. Raises ValueError for any other file."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            kind = (stored.metadata() or {}).get("kind")
            if kind != KIND:
                raise ValueError(f"{file}: is {kind!r}, expected {KIND!r}; make one with the verb `train`")
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); make one with the verb `train`") from error
    model = Classifier()
    model.load_state_dict(weights)
    return model.eval()


def extractor(weights: Path | None) -> ModuleExtractor:
    """Create the extractor for `mar evaluate --features benchmarks/fashion_judge.py:extractor --weights FILE`.

    Features are the 128 of the penultimate layer. Logits are of the ten classes of the bundled images, for the class
    agreement. Raises ValueError if `weights` is not a file of `train`.
    """
    from mar.assets import FASHION_CLASSES
    from mar.evaluation.features import ModuleExtractor

    def prepare(images: Tensor) -> Tensor:
        if images.shape[1:] != (1, SIDE, SIDE):
            raise ValueError(f"fashion-judge: got pictures of {tuple(images.shape[2:])}, expected {SIDE} x {SIDE}")
        return images.float().div(255)

    if weights is None:
        raise ValueError("fashion-judge needs --weights FILE; make one with the verb `train` of fashion_judge.py")
    return ModuleExtractor(
        load_classifier(weights),
        "fashion-judge",
        prepare,
        recipe="28 x 28 grey; x / 255",
        width=WIDTH,
        channels=1,
        classes=FASHION_CLASSES,
    )


def statistics(values: Floats) -> tuple[Floats, Floats]:
    """Compute mean (d,) and unbiased covariance (d, d) of features (n, d), n at least 2."""
    if len(values) < 2:
        raise ValueError(f"got {len(values)} images, expected at least 2 (1,000 for a comparable distance)")
    return values.mean(0), np.cov(values, rowvar=False)


def frechet(mu1: Floats, cov1: Floats, mu2: Floats, cov2: Floats) -> float:
    """Compute the squared Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2), with both roots by symmetric
    eigendecomposition in float64. Unlike a root of C1 C2, this keeps full precision for singular covariances.
    Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.
    """

    def root(cov: Floats) -> Floats:
        values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
        return np.asarray((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)

    overlap = np.linalg.svd(root(cov1) @ root(cov2), compute_uv=False).sum()
    distance = np.square(np.asarray(mu1, np.float64) - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(0.0, float(distance))


def balanced(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Draw the indices of `count` images without repetition; class sizes differ by at most one."""
    rng = np.random.default_rng(seed)
    shares = [(count + len(CLASSES) - 1 - c) // len(CLASSES) for c in range(len(CLASSES))]
    members = [np.flatnonzero(labels == c) for c in range(len(CLASSES))]
    if any(share > len(member) for share, member in zip(shares, members, strict=True)):
        raise ValueError(f"count: got {count}, but a class has {min(map(len, members))} images: ask for fewer")
    return np.concatenate([rng.choice(m, s, replace=False) for m, s in zip(members, shares, strict=True)])


def nearest(images: Bytes, others: Bytes, batch: int = 500) -> Floats:
    """Compute the L2 distance of each image to the nearest of `others`, pixels in [0, 1]."""
    theirs = to_pixels(others).flatten(1)
    norms = theirs.square().sum(1)
    distances = []
    for start in range(0, len(images), batch):
        ours = to_pixels(images[start : start + batch]).flatten(1)
        closest = torch.addmm(norms, ours, theirs.T, alpha=-2).argmin(1)
        # exactly 0 for a copy, unlike a^2 + b^2 - 2ab
        distances.append((ours - theirs[closest]).double().square().sum(1).sqrt())
    return np.asarray(torch.cat(distances).numpy())


@dataclass(frozen=True)
class Reference:
    """Classifier and real images to evaluate against."""

    model: Classifier
    train: Split
    test: Split
    neighbors: Bytes
    """(m, 28, 28): training images of the generator, of which generated ones may be copies."""


@dataclass(frozen=True)
class Report:
    """Result of `judge`: squared Fréchet distances, and L2 distances (pixels in [0, 1]) to nearest neighbors."""

    count: int
    agreement: float
    per_class: tuple[float, ...]
    """Agreement of each class, NaN for a class without images."""
    real_per_class: tuple[float, ...]
    """Agreement of each class on the real test images."""
    distance: float
    real_distances: tuple[float, ...]
    """Distances of several subsets of `count` real training images; the first one's seed is 0."""
    neighbors: int
    nearest_median: float
    nearest_5: float
    real_nearest_median: float
    real_nearest_5: float
    closer: float
    """Share of images nearer to a training image than 99% of the real test images are: 1% expected."""

    @property
    def ratio(self) -> float:
        """Distance over that of the first subset of real training images; inf if that is 0."""
        real = self.real_distances[0]
        return self.distance / real if real else np.inf

    @property
    def worst(self) -> float:
        """Agreement of the worst class that has images."""
        return float(np.nanmin(self.per_class))

    def row(self) -> str:
        """Format the figures in one line, to compare runs."""
        return (
            f"n {self.count} | agreement {self.agreement:.1%} | worst class {self.worst:.1%} | "
            f"Fréchet {self.distance:.3f} | real {self.real_distances[0]:.3f} | ratio {self.ratio:.2f} | "
            f"nearest {self.nearest_median:.2f} (real {self.real_nearest_median:.2f}) | "
            f"closer than 1% {self.closer:.1%}"
        )

    def text(self) -> str:
        """Format the whole report, with each target and whether it is met."""

        def target(met: bool, text: str) -> str:
            return f"{'met' if met else 'MISSED'}: {text}"

        real = self.real_distances
        shares = zip(CLASSES, self.per_class, self.real_per_class, strict=True)
        classes = "\n".join(f"  {name:<12} {ours:6.1%}  {theirs:6.1%}" for name, ours, theirs in shares if ours == ours)
        return f"""\
{self.count} images
class agreement {self.agreement:.1%} ({target(self.agreement >= AGREEMENT, f"at least {AGREEMENT:.0%}")})
  of each class, and of the real test images
{classes}
  worst {self.worst:.1%} ({target(self.worst >= WORST_CLASS, f"at least {WORST_CLASS:.0%}")})
Fréchet distance to the test pictures, {WIDTH} features of this classifier
  these images          {self.distance:.4f}
  real training ones    {real[0]:.4f} ({len(real)} draws: mean {np.mean(real):.4f}, {min(real):.4f} to {max(real):.4f})
  ratio                 {self.ratio:.2f} ({target(self.ratio <= RATIO, f"at most {RATIO:g}")})
nearest of {self.neighbors} training images, L2, pixels in [0, 1]
  these images          median {self.nearest_median:.3f}, 5% quantile {self.nearest_5:.3f}
  real test images      median {self.real_nearest_median:.3f}, 5% quantile {self.real_nearest_5:.3f}
  closer than the 1% quantile of real test images: {self.closer:.1%} (1% expected, more for copies)
{self.row()}"""


def agreements(logits: Floats, labels: NDArray[np.int64]) -> tuple[float, ...]:
    """Compute the share of correctly classified images of each class, NaN for a class without images."""
    correct = logits.argmax(1) == labels
    members = [correct[labels == c] for c in range(len(CLASSES))]
    return tuple(float(member.mean()) if len(member) else float("nan") for member in members)


def judge(images: Bytes, labels: NDArray[np.int64], reference: Reference) -> Report:
    """Evaluate images (n, 28, 28) uint8, generated with the class labels (n,)."""
    generated = Split(images, labels)
    model, test = reference.model, reference.test
    values, logits = features(model, generated.images)
    test_values, test_logits = features(model, test.images)
    target = statistics(test_values)
    real = []
    for seed in range(DRAWS):
        subset = reference.train.images[balanced(reference.train.labels, len(images), seed)]
        real.append(frechet(*statistics(features(model, subset)[0]), *target))
    near, real_near = (nearest(split.images, reference.neighbors) for split in (generated, test))
    return Report(
        count=len(images),
        agreement=float((logits.argmax(1) == generated.labels).mean()),
        per_class=agreements(logits, generated.labels),
        real_per_class=agreements(test_logits, test.labels),
        distance=frechet(*statistics(values), *target),
        real_distances=tuple(real),
        neighbors=len(reference.neighbors),
        nearest_median=float(np.median(near)),
        nearest_5=float(np.quantile(near, 0.05)),
        real_nearest_median=float(np.median(real_near)),
        real_nearest_5=float(np.quantile(real_near, 0.05)),
        closer=float((near < np.quantile(real_near, 0.01)).mean()),
    )


def run_train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    model = train(load_split(args.data, "train"), epochs=args.epochs, seed=args.seed)
    seconds = time.perf_counter() - started
    test_accuracy = accuracy(model, load_split(args.data, "t10k"))
    header = {
        "test_accuracy": f"{test_accuracy:.4f}",
        "epochs": args.epochs,
        "seed": args.seed,
        "threads": args.threads,
    }
    header |= {"features": WIDTH, "torch": torch.__version__}
    save_classifier(model, args.out, {key: str(value) for key, value in header.items()})
    print(f"test accuracy {test_accuracy:.2%} after {seconds:.0f} s -> {args.out}")


def load_pictures(file: Path) -> Split:
    """Read an .npz with `images` (n, 28, 28) uint8 and `labels` (n,)."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: {error}; expected an .npz with the arrays `images` and `labels`") from error
    Split(images, labels)  # checks the dtype before the cast below
    return Split(images, labels.astype(np.int64))


def to_bytes(pictures: Iterable[Image.Image]) -> Bytes:
    """Convert images of 28 by 28 pixels to (n, 28, 28) uint8."""
    return np.stack([np.asarray(picture.convert("L"), np.uint8) for picture in pictures])


def draw(checkpoint: str, count: int, seed: int, batch: int = 100) -> Split:
    """Generate `count` images by a model's default settings, classes in turn, seeds from `seed` on."""
    import mar

    model = mar.load(checkpoint)
    labels = [i % len(CLASSES) for i in range(count)]
    pictures: list[Image.Image] = []
    started = time.perf_counter()
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        pictures += model.sample(labels=labels[start:stop], seeds=list(range(seed + start, seed + stop)), progress=True)
    seconds = time.perf_counter() - started
    print(f"{count} images from {checkpoint!r} in {seconds:.0f} s, {seconds / count:.3f} s each")
    return Split(to_bytes(pictures), np.array(labels, np.int64))


def open_reference(args: argparse.Namespace) -> Reference:
    """Open the classifier and the real images."""
    full, test = load_split(args.data, "train"), load_split(args.data, "t10k")
    neighbors = full.images
    if args.neighbors == "bundled":
        from mar.data.sources import open_source

        source = open_source("fashion", "train")
        neighbors = to_bytes(source[i].image for i in range(len(source)))
    return Reference(load_classifier(args.classifier), full, test, neighbors)


def run_judge(args: argparse.Namespace) -> None:
    pictures = load_pictures(args.pictures)
    print(judge(pictures.images, pictures.labels, open_reference(args)).text())


def run_model(args: argparse.Namespace) -> None:
    reference = open_reference(args)  # first: a wrong path fails before a thousand images are generated
    pictures = draw(args.checkpoint, args.count, args.seed)
    if args.save:
        np.savez_compressed(args.save, images=pictures.images, labels=pictures.labels)
    print(judge(pictures.images, pictures.labels, reference).text())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four gzipped IDX files")
    parser.add_argument("--classifier", type=Path, help="a file of `train` (for judge and model)")
    parser.add_argument(
        "--neighbors",
        "--neighbours",
        choices=("bundled", "full"),
        default="bundled",
        help="look for copies of the package's 10,000 training images or of all 60,000 (default: bundled)",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help="train the classifier")
    verb.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    verb.add_argument("--epochs", type=int, default=5)
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--threads", type=int, default=2, help="another count gives slightly other weights")
    verb.set_defaults(run=run_train)
    verb = verbs.add_parser("judge", help="evaluate the images of an .npz")
    verb.add_argument("pictures", type=Path, help=".npz with images (n, 28, 28) uint8 and labels (n,)")
    verb.set_defaults(run=run_judge)
    verb = verbs.add_parser("model", help="generate images by a model and evaluate them")
    verb.add_argument("checkpoint", nargs="?", default="fashion", help="an argument of mar.load (default: fashion)")
    verb.add_argument("--count", type=int, default=1000)
    verb.add_argument("--seed", type=int, default=0, help="seed of the first image")
    verb.add_argument("--save", type=Path, help=".npz to save the images to")
    verb.set_defaults(run=run_model)
    args = parser.parse_args(argv)
    if args.verb != "train" and args.classifier is None:
        parser.error(f"{args.verb} needs --classifier FILE; make one with the verb train")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"fashion_judge: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
