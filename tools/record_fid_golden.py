"""Record metrics of torch-fidelity and torchmetrics for tests/parity/test_inception.py.

    python tools/record_fid_golden.py small tests/parity/golden/inception --scratch FOLDER
    python tools/record_fid_golden.py large tests/parity/golden/inception --scratch FOLDER

It needs both libraries (`pip install "mar[fid]" torchmetrics scipy`); the tests do not. The Inception network has
random weights, kept in FOLDER outside the repository. Its batch norms get the statistics of some images, so that its
features are not degenerate. `small`: torch-fidelity, torchmetrics and mar each run the network on the same images.
`large`: torch-fidelity runs it on 2,500 and 2,500 images, and the others compute from its features. One thread: about
15 minutes and an hour.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mar.evaluation.features.inception import inception
from mar.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from mar.evaluation.statistics import Moments

SIDE, BATCH = 32, 25
TAP, TAPPED, WHOLE, LARGE, KEPT = "64", 400, 200, 2500, 320
CLASSES = 20  # of the 1008 logits that the golden file keeps
Numbers = dict[str, float]


def declare_missing_operators() -> None:
    """Make torchvision importable if its compiled part is for another torch (CUDA instead of CPU).

    Its import refers to two of its operators. They are declared, not defined: nothing here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_kept"] = library  # the declarations last as long as this does


def pictures(count: int, seed: int, contrast: float) -> Tensor:
    """Draw images (count, 3, 32, 32) uint8: smooth fields of two scales, some with a grid."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), size=(SIDE, SIDE), mode="bicubic")
    fine = torch.randn(count, 3, SIDE, SIDE, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    grid = (torch.arange(SIDE) % 8 < 4).float() * (torch.rand(count, 1, 1, 1, generator=generator) < 0.3)
    return ((coarse + 0.5 * fine * contrast + grid) * 50 * contrast + 128).clamp(0, 255).byte()


def random_inception(path: Path) -> None:
    """Write the network with random weights, its batch norms fitted to 100 images, unless it exists."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """Do nothing: the constructor insists on a file."""

    if path.exists():
        return
    torch.save({}, path)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None  # running statistics become those of the one batch below
    with torch.no_grad():
        values = network.train()(pictures(100, 1, 1.0))[0]
        nn.init.normal_(network.fc.weight)
        network.fc.weight.div_(values.std(0).norm() / 2)  # logits that differ by about two from picture to picture
    network.eval()
    torch.save({name: tensor.clone() for name, tensor in network.state_dict().items()}, path)


class Pictures(torch.utils.data.Dataset[Tensor]):
    """Images as a data set for torch-fidelity."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def by_fidelity(fake: Tensor, real: Tensor, weights: Path, tap: str) -> Numbers:
    """Compute metrics of images by torch-fidelity."""
    import torch_fidelity

    results = torch_fidelity.calculate_metrics(
        input1=Pictures(fake), input2=Pictures(real), feature_extractor_weights_path=str(weights),
        cuda=False, save_cpu_ram=True, feature_extractor="inception-v3-compat",
        batch_size=BATCH, fid=True, kid=True, isc=tap == "2048", prc=True, feature_layer_fid=tap,
        feature_layer_kid=tap, feature_layer_prc=tap, isc_splits=1, kid_subsets=1,
        kid_subset_size=min(len(fake), len(real)), cache=False, verbose=False,
    )  # fmt: skip
    names = {"frechet_inception_distance": "fid", "kernel_inception_distance_mean": "kid"}
    names |= {"inception_score_mean": "is", "precision": "precision", "recall": "recall"}
    return {short: float(results[long]) for long, short in names.items() if long in results}


def by_torchmetrics(fake: Tensor, real: Tensor, features: nn.Module, logits: nn.Module | None) -> Numbers:
    """Compute metrics by torchmetrics, in float64 if it offers that.

    `fake` and `real` are inputs of the modules `features` and `logits`.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    numbers: Numbers = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        fid = FrechetInceptionDistance(feature=features, input_img_size=(3, SIDE, SIDE)).set_dtype(torch.float64)
        kid = KernelInceptionDistance(feature=features, subsets=1, subset_size=min(len(fake), len(real)))
        for images, is_real in ((real, True), (fake, False)):
            for batch in images.split(BATCH):
                fid.update(batch, real=is_real)
                kid.update(batch, real=is_real)
        numbers |= {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
        if logits is not None:
            score = InceptionScore(feature=logits, splits=1)
            for batch in fake.split(BATCH):
                score.update(batch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the deviation over one split
                numbers["is"] = float(score.compute()[0])
    return numbers


def by_mar(fake: Tensor, real: Tensor, logits: Tensor | None) -> Numbers:
    """Compute our metrics of features."""
    moments = [Moments(fake.shape[1]), Moments(fake.shape[1])]
    for part, rows in zip(moments, (fake, real), strict=True):
        for batch in rows.split(64):
            part.update(batch)
    precision, recall = precision_recall(real, fake)
    size = min(len(fake), len(real))
    numbers = {"fid": frechet_distance(*moments), "kid": kernel_distance(real, fake, 1, size, 0)[0]}
    numbers |= {"precision": precision, "recall": recall}
    return numbers | ({} if logits is None else {"is": inception_score(logits, 1)[0]})


def network_of_torchmetrics(weights: Path, tap: str) -> nn.Module:
    """Create torchmetrics' variant of the network, with torch-fidelity's resize instead of its own."""
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", [tap], str(weights), antialias=False)


def extract(images: Tensor, weights: Path, tap: str) -> tuple[Tensor, Tensor | None]:
    """Compute features and logits by our extractor."""
    extractor = inception(weights, tap=tap)
    parts = [extractor(batch) for batch in images.split(BATCH)]
    logits = [part.logits for part in parts if part.logits is not None]
    return torch.cat([part.values for part in parts]), torch.cat(logits) if logits else None


class Given(nn.Module):
    """Stands in for a network: returns its input, which is features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def small(weights: Path, folder: Path) -> None:
    """Record metrics by all three from images, and the golden file of features."""
    results: dict[str, Any] = {}
    for tap, count in ((TAP, TAPPED), ("2048", WHOLE)):
        began = time.perf_counter()
        fake, real = pictures(count, 2, 0.8), pictures(count, 3, 1.0)
        whole = tap == "2048"
        logits_of = network_of_torchmetrics(weights, "logits_unbiased") if whole else None
        (ours, logits), (others, _) = extract(fake, weights, tap), extract(real, weights, tap)
        results[f"{tap} of {count} and {count}"] = {
            "mar": by_mar(ours, others, logits),
            "torch-fidelity": by_fidelity(fake, real, weights, tap),
            "torchmetrics": by_torchmetrics(fake, real, network_of_torchmetrics(weights, tap), logits_of),
        }
        print(f"{tap}: {time.perf_counter() - began:.0f} s", flush=True)
        if not whole:
            kept = {"fake": ours[:KEPT].contiguous(), "real": others[:KEPT].contiguous()}
        else:
            assert logits is not None
            kept["logits"] = logits[:, :CLASSES].contiguous()
    save_file(kept, folder / "features.safetensors")
    results["features.safetensors"] = of_features(kept["fake"], kept["real"], kept["logits"])
    write(folder / "small.json", results)


def of_features(fake: Tensor, real: Tensor, logits: Tensor) -> dict[str, Numbers]:
    """Compute metrics of given features by torch-fidelity and torchmetrics."""
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    sides = [metric_fid.fid_features_to_statistics(side) for side in (fake, real)]
    kid = metric_kid.kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=len(fake), verbose=False)
    prc = metric_prc.prc_features_to_metric(fake, real, verbose=False)
    fidelity = {
        "fid": metric_fid.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "is": metric_isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
    }
    width = fake.shape[1]
    theirs = by_torchmetrics(fake, real, Given(width), None)
    theirs |= {"is": by_torchmetrics(logits, logits, Given(logits.shape[1]), Given(logits.shape[1]))["is"]}
    return {"torch-fidelity": {name: float(value) for name, value in fidelity.items()}, "torchmetrics": theirs}


def large(weights: Path, folder: Path) -> None:
    """Record metrics by torch-fidelity on 2,500 and 2,500 images, and by the others from its features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    answers: list[dict[str, Tensor]] = []
    began = time.perf_counter()

    def keep(network: Any, images: Any, answer: Any) -> None:
        if isinstance(network, Network):
            answers.append({name: part.clone() for name, part in zip(network.features_list, answer, strict=True)})
            print(f"{len(answers) * BATCH} pictures, {time.perf_counter() - began:.0f} s", flush=True)

    fake, real = pictures(LARGE, 2, 0.8), pictures(LARGE, 3, 1.0)
    hook = nn.modules.module.register_module_forward_hook(keep)
    theirs = by_fidelity(fake, real, weights, "2048")
    hook.remove()
    values = torch.cat([answer["2048"] for answer in answers])
    logits = torch.cat([answer["logits_unbiased"] for answer in answers[: LARGE // BATCH]])
    assert values.shape == (2 * LARGE, 2048)
    torch.save({"values": values, "logits": logits}, weights.with_name("large.pt"))
    ours, our_logits = extract(fake[:BATCH], weights, "2048")
    assert our_logits is not None
    same = {"features": float((ours - values[:BATCH]).abs().max()), "of at most": float(values.abs().max())}
    sides = values[:LARGE], values[LARGE:]
    results = {
        "mar": by_mar(*sides, logits),
        "torch-fidelity": theirs,
        "torchmetrics": by_torchmetrics(*sides, Given(2048), None),
        "largest difference of our extractor, 50 pictures": same,
    }
    results["torchmetrics"] |= {"is": by_torchmetrics(logits, logits, Given(1008), Given(1008))["is"]}
    write(folder / "large.json", {f"2048 of {LARGE} and {LARGE}": results})


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results with the versions of the libraries."""
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "torch_fidelity", "torchmetrics")}
    path.write_text(json.dumps({"versions": versions | {"numpy": np.__version__}} | results, indent=2) + "\n", "utf-8")
    print(path.read_text("utf-8"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=["small", "large"])
    parser.add_argument("folder", type=Path, help="folder of the golden files")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the random weights (95 MB)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    declare_missing_operators()
    weights = args.scratch / "inception.pth"
    random_inception(weights)
    {"small": small, "large": large}[args.size](weights, args.folder)


if __name__ == "__main__":
    main()
