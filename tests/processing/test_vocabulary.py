"""Vocabulary: reading words, embedding them once, and the cache."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import normalize

from ovsam.errors import InputError
from ovsam.processing.vocabulary import Vocabulary, check_text_length, split_words, to_vocabulary


class Encoder:
    """A text tower for tests: a fixed vector for each sentence; counts the sentences it was given."""

    def __init__(self, width=8):
        self.width, self.sentences = width, []

    def __call__(self, sentences):
        self.sentences += sentences
        rows = [torch.randn(self.width, generator=torch.Generator().manual_seed(sum(s.encode()))) for s in sentences]
        return torch.stack(rows) * 3


# Words


def test_a_list_keeps_its_order_case_and_each_word_once():
    vocabulary = Vocabulary([" iPod ", "dog", "Dog", "dog"])
    assert vocabulary.prompts == vocabulary.labels == ["iPod", "dog", "Dog"]
    assert vocabulary.prompt_label_ids == [0, 1, 2]


def test_synonyms_share_a_label():
    vocabulary = Vocabulary({"puppy": "dog", "cat": "cat", "hound": "dog"})
    assert vocabulary.prompts == ["puppy", "cat", "hound"]
    assert vocabulary.labels == ["dog", "cat"]
    assert vocabulary.prompt_label_ids == [0, 1, 0]
    assert vocabulary.as_mapping() == {"puppy": "dog", "cat": "cat", "hound": "dog"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("words.txt", "# two words\nred car\n\n  bow-tie \n"),
        ("words.json", '["red car", "bow-tie"]'),
        ("words.csv", "red car\nbow-tie\n"),
        ("headed.CSV", "\ufeffPrompt\nred car\nbow-tie\n"),
    ],
)
def test_files_of_words(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert Vocabulary(path).labels == Vocabulary(str(path)).prompts == ["red car", "bow-tie"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("words.json", '{"puppy": "dog", "cat": "cat"}'), ("words.csv", 'prompt,label\n"puppy",dog\ncat,cat\n')],
)
def test_files_of_synonyms(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    vocabulary = Vocabulary(path)
    assert (vocabulary.prompts, vocabulary.labels) == (["puppy", "cat"], ["dog", "cat"])


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("coco", 80, {0: "person", 24: "backpack", 79: "toothbrush"}),
        ("lvis", 1203, {0: "aerosol can", 56: "baseball", 1202: "zucchini"}),
        ("imagenet21k", 21841, {0: "organism", 5: "animal"}),
    ],
)
def test_built_in_vocabularies(name, count, some):
    vocabulary = Vocabulary(name)
    assert len(vocabulary.prompts) == len(set(vocabulary.prompts)) == len(vocabulary.labels) == count
    assert {index: vocabulary.labels[index] for index in some} == some


def test_names_that_imagenet_classes_share_are_made_unique():
    labels = Vocabulary("imagenet21k").labels
    assert {"loft", "pigeon loft", "hen", "hen (2)"} <= set(labels) and "loft (2)" not in labels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "The vocabulary is empty"),
        (["  ", ""], "The vocabulary is empty"),
        ({"dog": ""}, "The vocabulary is empty"),
        (5, "A vocabulary is a list of class names"),
        (float("nan"), "A vocabulary is a list of class names"),
        ("a" * 300 + ".txt", "There is no vocabulary"),
        (["\ud800"], "a character that is not text"),
        (["dog", 7], "must hold class names as strings, not 7"),
        ({"dog": "animal", "dog ": "pet"}, "'dog' has two labels, 'animal' and 'pet'"),
        ("koko", r"no vocabulary 'koko'.*coco, lvis, imagenet21k.*the path of a .txt, .json or .csv file"),
        ("missing.txt", "no vocabulary 'missing.txt'"),
    ],
)
def test_bad_words_are_one_clear_sentence(words, message):
    with pytest.raises(InputError, match=message):
        Vocabulary(words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("picture.txt", b"\x89PNG\r\n\x1a\n\x00\xff", "picture.txt' cannot be read"),
        ("empty.txt", b"", "The vocabulary is empty"),
        ("broken.json", b'["dog", ', "broken.json' cannot be read"),
        ("number.json", b"3", "a list of class names or a mapping"),
        ("nested.json", b'[["dog"]]', "must hold class names as strings, not"),
        ("wide.csv", b"dog,cat\nbird,fish\n", "first line must be 'prompt,label'"),
        ("deep.json", b"[" * 100_000, "nested too deeply"),
        ("ragged.csv", b"prompt,label\ndog,dog\ncat\n", "'cat' has 1 columns instead of 2"),
        ("twice.csv", b"prompt,label\ndog,animal\ndog,pet\n", "'dog' has two labels"),
        ("words.yaml", b"- dog\n", "There is no vocabulary"),
    ],
)
def test_bad_files_are_one_clear_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Vocabulary(tmp_path / name)


def test_a_phrase_of_500_words_is_one_clear_sentence():
    phrase = " ".join(["word"] * 500)
    check_text_length(["dog", phrase], [3, 77], max_length=77)
    message = r"^The phrase 'word .*\.\.\.' is too long: 502 tokens; .* at most 77\.$"
    with pytest.raises(InputError, match=message) as error:
        check_text_length(["dog", phrase], [3, 502], max_length=77)
    assert len(str(error.value)) < 200


# Embeddings


def test_templates_are_averaged_as_in_vild():
    encode = Encoder()
    embeds = Vocabulary(["dog", "{a} cat"]).embed(encode, templates=("a {}.", "the {}"))
    first = normalize(encode(["a dog."]), dim=-1)
    second = normalize(encode(["the dog"]), dim=-1)
    torch.testing.assert_close(embeds[:1], normalize((first + second) / 2, dim=-1))
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    assert "the {a} cat" in encode.sentences


def test_chunks_give_the_same_embeddings():
    words = [f"word {index}" for index in range(23)]
    whole = Vocabulary(words).embed(Encoder())
    torch.testing.assert_close(Vocabulary(words).embed(Encoder(), chunk_size=4, progress=False), whole, rtol=0, atol=0)


def test_templates_of_the_vocabulary_come_first():
    encode = Encoder()
    Vocabulary(["dog"], templates=["my {}"]).embed(encode, templates=("a {}",))
    assert encode.sentences == ["my dog"]


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{} and {}",), 5, [5]])
def test_bad_templates_raise_an_error(templates):
    with pytest.raises(InputError, match="template"):
        Vocabulary(["dog"], templates=templates)


def test_a_big_vocabulary_shows_its_progress(capsys):
    Vocabulary([f"word {index}" for index in range(50)]).embed(Encoder(), chunk_size=5)
    assert "50/50" in capsys.readouterr().err
    Vocabulary([f"word {index}" for index in range(50)]).embed(Encoder(), chunk_size=5, progress=False)
    assert capsys.readouterr().err == ""


def test_a_function_is_told_the_progress_and_may_stop(capsys):
    told = []
    Vocabulary([f"word {index}" for index in range(12)]).embed(
        Encoder(), chunk_size=5, progress=lambda *state: told.append(state)
    )
    assert told == [(0, 12), (5, 12), (10, 12), (12, 12)] and capsys.readouterr().err == ""

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Vocabulary(["dog"]).embed(Encoder(), progress=stop)


# Cache


def cached(tmp_path, words=("dog", "cat"), templates=("{}",), text_hash="tower"):
    encode = Encoder()
    embeds = Vocabulary(list(words)).embed(encode, templates, text_hash, tmp_path)
    return embeds, len(encode.sentences)


def test_a_cached_vocabulary_is_not_encoded_again(tmp_path):
    fresh, encoded = cached(tmp_path)
    again, encoded_again = cached(tmp_path)
    assert (encoded, encoded_again) == (2, 0)
    assert torch.equal(fresh, again)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("other", [{"words": ("cat", "dog")}, {"templates": ("a {}",)}, {"text_hash": "another"}])
def test_words_templates_and_tower_make_the_key(tmp_path, other):
    cached(tmp_path)
    assert cached(tmp_path, **other)[1] == 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def replace_with_text(path):
    path.write_text("not a safetensors file")


def empty(path):
    path.write_bytes(b"")


def replace_with_another(path):
    cached(path.parent / "other", words=("red", "green"))
    (other,) = (path.parent / "other").iterdir()
    other.replace(path)


def rewrite(change, rename="text_embeds", **other):
    """Other embeddings under metadata that vouch for them."""

    def damage(path):
        with safe_open(path, framework="pt") as file:
            metadata, embeds = file.metadata(), change(file.get_tensor("text_embeds"))
        digest = hashlib.sha256(embeds.contiguous().view(torch.uint8).numpy().data).hexdigest()
        save_file({rename: embeds.contiguous()}, path, metadata | {"sha256": digest} | other)

    return damage


def no_metadata(path):
    with safe_open(path, framework="pt") as file:
        embeds = file.get_tensor("text_embeds")
    save_file({"text_embeds": embeds}, path)


DAMAGES = {
    "truncated": truncate,
    "one bit": flip_a_bit,
    "text": replace_with_text,
    "empty": empty,
    "another vocabulary": replace_with_another,
    "shape": rewrite(lambda embeds: embeds.view(4, 4)),
    "one row more": rewrite(lambda embeds: torch.cat([embeds, embeds[:1]])),
    "one dimension": rewrite(lambda embeds: embeds.flatten()),
    "NaN": rewrite(lambda embeds: embeds.clone().index_fill_(1, torch.tensor([3]), float("nan"))),
    "infinity": rewrite(lambda embeds: embeds / 0),
    "precision": rewrite(lambda embeds: embeds.bfloat16()),
    "another tower": rewrite(lambda embeds: embeds, text_hash="another"),
    "another format": rewrite(lambda embeds: embeds, format="else"),
    "another tensor": rewrite(lambda embeds: embeds, rename="embeds"),
    "no metadata": no_metadata,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_foreign_cache_file_is_rebuilt(tmp_path, damage):
    fresh, _ = cached(tmp_path)
    damage(next(tmp_path.glob("*.safetensors")))
    rebuilt, encoded = cached(tmp_path)
    assert encoded == 2 and torch.equal(rebuilt, fresh)
    assert cached(tmp_path)[1] == 0


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    embeds, encoded = cached(blocked)
    assert encoded == 2 and embeds.shape == (2, 8) and "could not be cached" in caplog.text


def test_a_cache_without_the_towers_hash_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="text_hash"):
        cached(tmp_path, text_hash="")


def test_cache_metadata_is_readable(tmp_path):
    cached(tmp_path)
    with safe_open(next(tmp_path.iterdir()), framework="pt") as file:
        assert json.loads(file.metadata()["prompts"]) == ["dog", "cat"]


def test_typed_words_are_kept_and_the_tower_reads_plain_ones():
    assert Vocabulary(["DOG  FACE.", "Café!"]).labels == ["DOG  FACE.", "Café!"]
    encode = Encoder()
    Vocabulary(["DOG  FACE.", "C.", "..."]).embed(encode)
    assert encode.sentences == ["dog face", "c", "..."]


def test_empty_words_among_others_are_left_out(caplog):
    assert Vocabulary("car, dog, ".split(",")).labels == ["car", "dog"]
    assert "1 empty class names were removed" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("car", ["car"]),
        ("car, red ball", ["car", "red ball"]),
        ("car . dog . cat", ["car", "dog", "cat"]),
        ("car. dog. cat.", ["car", "dog", "cat"]),
        ("St. Bernard, Mt. Fuji", ["St. Bernard", "Mt. Fuji"]),
        ('"salt, pepper", dog', ["salt, pepper", "dog"]),
        ("car\ndog\n", ["car", "dog"]),
        (" , ", []),
    ],
)
def test_one_text_is_split_as_people_write(text, words):
    assert split_words(text) == words


def test_a_text_is_words_unless_it_names_a_vocabulary(tmp_path):
    (tmp_path / "mine.txt").write_text("owl\n")
    assert to_vocabulary("car, dog").labels == ["car", "dog"]
    assert len(to_vocabulary("coco").labels) == 80
    assert to_vocabulary(str(tmp_path / "mine.txt")).labels == ["owl"]
    assert to_vocabulary(to_vocabulary(["a"])).labels == ["a"]
