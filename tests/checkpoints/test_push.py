"""Publishing and downloading, against a Hub on this machine that speaks the real one's HTTP API (tests/fake_hub.py)."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import picture, tiny_model, tiny_processor
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import ovsam_cli
from ovsam.checkpoints import push as pushing
from ovsam.checkpoints.cards import check_card
from ovsam.checkpoints.weight_files import check_weights
from ovsam.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

CARD = "---\nlicense: apache-2.0\nlibrary_name: ovsam\ntags: [tiny]\n---\n# Tiny\n"

# A process of its own for all that talks to the Hub: HF_ENDPOINT is read once, when huggingface_hub is imported. It
# runs lines of Python one by one and returns their output, or their InputError.
CLIENT = """
import contextlib, io, sys, time
sys.path[:0] = sys.argv[1:]
from ovsam.errors import InputError
names = {}
exec('import huggingface_hub, ovsam, ovsam_cli, torch; from common import picture; from pathlib import Path; '
     'from transformers import AutoModel, AutoProcessor; from ovsam.checkpoints.push import HubFolder, upload; '
     'from ovsam.checkpoints.weight_files import fetch; torch.set_grad_enabled(False)', names)
time.sleep = lambda seconds: None  # between one try and the next
answers = sys.stdout
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(line, names)
        except InputError as error:
            print("InputError:", error)
        except Exception as error:
            print("crashed:", repr(error))
    print(repr(said.getvalue()), file=answers, flush=True)
"""


class Client:
    def __init__(self, hub: FakeHub, home: Path):
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
        }
        for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", CLIENT, str(ROOT), str(ROOT / "tests")]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return eval(self.process.stdout.readline() or "'the process died'")


@pytest.fixture(scope="module")
def hub():
    hub = FakeHub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    client = Client(hub, home)
    yield client
    client.process.stdin.close()
    client.process.wait(20)
    client.process.stdout.close()


@pytest.fixture(autouse=True)
def reset(hub):
    hub.cut_uploads = hub.cut_downloads = 0
    hub.served.clear()
    hub.requests.clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A whole tiny model in two shards, with the other files of a run in its folder."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model().save_pretrained(folder, max_shard_size="1MB")
    tiny_processor().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "optimizer.pt").write_bytes(b"state")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """An adapter."""
    folder = tmp_path_factory.mktemp("head")
    tiny_model().concepts.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.replace("tags", "base_model: tester/whole\ntags"))
    return folder


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def wrong_header(path: Path, header: dict | None = None, length: int | None = None) -> None:
    """Rewrite a safetensors file's header: the tensors it promises, or its own length."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    text = content[8:end] if header is None else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[end:])


@pytest.mark.slow
def test_push_and_load(hub, client, source):
    """From a folder to the Hub by the command line, and from the Hub to equal outputs by ovsam.load's way and by
    transformers'."""
    said = client.run(f"ovsam_cli.main(['push', {str(source)!r}, 'tester/whole'])")
    assert said.splitlines()[-1] == f"{hub.url}/tester/whole", said
    assert "not sent: optimizer.pt" in said
    files = hub.files("tester/whole")
    sent = {".gitattributes", "README.md", "config.json", "modeling_ovsam.py", "processor_config.json"}
    sent |= {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert set(files) == sent | {path.name for path in source.glob("*.safetensors")}
    assert all(files[path.name].content == path.read_bytes() for path in source.glob("*.safetensors"))
    assert json.loads(files["config.json"].content)["clip_config"]["dtype"] == "float32"
    assert not hub.repos["tester/whole"].private

    said = client.run(
        "folder = fetch('tester/whole'); "
        "models = [AutoModel.from_pretrained(name).eval() for name in (folder, 'tester/whole')]; "
        "inputs = AutoProcessor.from_pretrained(folder)(images=picture(3), text=['cat', 'dog'], "
        "input_boxes=[[[5, 9, 70, 80]]]); "
        "answers = [m(**inputs) for m in models]; "
        f"torch.save([(a.pred_masks, a.logits) for a in answers], {str(source.parent / 'answers.pt')!r})"
    )
    assert said == "", said
    inputs = tiny_processor()(images=picture(3), text=["cat", "dog"], input_boxes=[[[5, 9, 70, 80]]])
    with torch.no_grad():
        expected = tiny_model()(**inputs)
    for masks, logits in torch.load(source.parent / "answers.pt"):
        torch.testing.assert_close(masks, expected.pred_masks, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_adapter_as_pull_request_branch_and_private(hub, client, head):
    """An adapter's folder, built once and sent in every way there is."""
    built = head.parent / "built-head"
    client.run(
        "from ovsam.checkpoints.push import build; "
        f"built = build(Path({str(head)!r}), 'tester/head', Path({str(head.parent)!r}))"
    )
    Path(head.parent / "built").rename(built)
    client.run(f"built = HubFolder(Path({str(built)!r}))")

    address = client.run("print(upload(built, 'tester/head', private=True))")
    assert address.strip() == f"{hub.url}/tester/head" and hub.repos["tester/head"].private
    assert set(hub.files("tester/head")) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "modeling_ovsam.py"
    }  # fmt: skip
    same = client.run(
        "head = ovsam.ConceptHead.from_pretrained('tester/head'); "
        f"other = ovsam.ConceptHead.from_pretrained({str(head)!r}); "
        "print(all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), other.state_dict().values())))"
    )
    assert same.strip() == "True", same

    (built / "README.md").write_text(CARD + "A word more.\n")
    hub.requests.clear()
    before = hub.repos["tester/head"].refs["main"]
    address = client.run("print(upload(built, 'tester/head', create_pr=True))")
    assert address.strip() == f"{hub.url}/tester/head/discussions/1"
    assert hub.repos["tester/head"].refs["main"] == before
    assert b"A word more" in hub.files("tester/head", "refs/pr/1")["README.md"].content
    assert not [each for each in hub.requests if each.startswith("PUT")]  # weights that it has are not sent again

    address = client.run("print(upload(built, 'tester/head', revision='v2'))")
    assert address.strip() == f"{hub.url}/tester/head/tree/v2"
    assert hub.repos["tester/head"].refs["main"] == before
    assert b"A word more" in hub.files("tester/head", "v2")["README.md"].content


@pytest.mark.slow
def test_weights_of_an_earlier_push_are_deleted(hub, client, head, tmp_path):
    """transformers would prefer an old model.safetensors to new shards."""
    hub.put(
        "tester/old", {"model.safetensors": b"old", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"hers"}
    )
    client.run(f"built = HubFolder(Path({str(copied(head, tmp_path / 'built'))!r})); upload(built, 'tester/old')")
    files = hub.files("tester/old")
    assert "model-00001-of-00002.safetensors" not in files and files["notes.txt"].content == b"hers"
    assert files["model.safetensors"].content == (head / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_public_repository_is_not_taken_for_a_private_one(hub, client, head):
    hub.put("tester/public", {"README.md": b"here"})
    said = client.run(f"upload(HubFolder(Path({str(head)!r})), 'tester/public', private=True)")
    assert said.startswith("InputError: tester/public exists and is public") and said.count("\n") == 1
    assert set(hub.files("tester/public")) == {"README.md"}


@pytest.mark.slow
def test_broken_upload(hub, client, head):
    """Nothing is committed, the error is one sentence, and the same call then succeeds."""
    hub.cut_uploads = 1000
    hub.objects.clear()  # files on the Hub are not uploaded again
    call = f"print(upload(HubFolder(Path({str(head)!r})), 'tester/broken'))"
    said = client.run(call)
    assert re.fullmatch(r"InputError: tester/broken was not published \(.+\); run the same command again .+\.\n", said)
    assert set(hub.files("tester/broken")) == {".gitattributes"}
    hub.cut_uploads = 1  # a single break is not even noticed
    assert client.run(call).strip() == f"{hub.url}/tester/broken"
    assert hub.files("tester/broken")["model.safetensors"].content == (head / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_wrong_token_and_unreachable_hub(hub, client, head):
    call = f"upload(HubFolder(Path({str(head)!r})), 'tester/refused')"
    said = client.run(
        f"huggingface_hub.hf_api.get_token = huggingface_hub.utils._headers.get_token = lambda: 'hf_bad'; {call}"
    )
    client.run(f"huggingface_hub.hf_api.get_token = huggingface_hub.utils._headers.get_token = lambda: {TOKEN!r}")
    assert (
        said.startswith("InputError: tester/refused was not published (the Hub responds 401") and said.count("\n") == 1
    )
    assert "tester/refused" not in hub.repos


def publish(hub, repo: str, folder: Path) -> None:
    hub.put(repo, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


def blobs(home: Path, repo: str) -> list[Path]:
    return [
        path for path in home.glob(f"hub/models--{repo.replace('/', '--')}/blobs/*") if path.suffix != ".incomplete"
    ]


@pytest.mark.slow
def test_broken_download(hub, client, head, home):
    """Half a file is never taken for a whole one; a second try completes it."""
    publish(hub, "tester/half", head)
    weights = hub.files("tester/half")["model.safetensors"]
    hub.cut_downloads = 1000
    said = client.run("print(fetch('tester/half'))")
    assert re.fullmatch(
        r"InputError: 'tester/half' could not be downloaded \(.+\); complete files are kept, .+\.\n", said
    ), said
    assert weights.oid not in [path.name for path in blobs(home, "tester/half")]
    hub.cut_downloads = 2  # it goes on where it broke off
    folder = Path(client.run("print(fetch('tester/half'))").strip())
    assert (folder / "model.safetensors").read_bytes() == weights.content


@pytest.mark.slow
def test_wrong_hash(hub, client, head, home):
    """huggingface_hub compares a download over HTTP with its size alone: other bytes of that size are found here."""
    publish(hub, "tester/swapped", head)
    weights = hub.files("tester/swapped")["model.safetensors"]
    other = bytearray(weights.content)
    other[-1] ^= 1
    hub.tamper("tester/swapped", "model.safetensors", bytes(other))
    said = client.run("print(fetch('tester/swapped'))")
    assert said.startswith("InputError: model.safetensors of tester/swapped was damaged in the download"), said
    assert weights.oid not in [path.name for path in blobs(home, "tester/swapped")]
    hub.served.clear()
    folder = Path(client.run("print(fetch('tester/swapped'))").strip())
    assert (folder / "model.safetensors").read_bytes() == weights.content
    # A Hub that stores other bytes than it was sent: found after the upload.
    hub.objects[weights.oid] = bytes(other)
    said = client.run(f"upload(HubFolder(Path({str(head)!r})), 'tester/stored')")
    assert (
        said
        == "InputError: The model.safetensors of tester/stored on the Hub differs from the uploaded file: push again.\n"
    )


LIES = {
    "more bytes than there are": {"header": {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}},
    "fewer bytes than there are": {"header": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}},
    "a header of 2^60 bytes": {"length": 1 << 60},
    "a header that ends in the weights": {"length": 1 << 14},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_header(lie, head, tmp_path):
    folder = copied(head, tmp_path / "head")
    wrong_header(folder / "model.safetensors", **LIES[lie])
    with pytest.raises(InputError, match=r"model.safetensors is not a complete safetensors file \(.+\): .+\."):
        check_weights(folder)


@pytest.mark.slow
def test_a_downloaded_wrong_header(hub, client, source, tmp_path):
    """ovsam.load raises an error of one sentence before memory is allocated."""
    folder = copied(source, tmp_path / "liar")
    shard = sorted(folder.glob("*.safetensors"))[0]
    wrong_header(shard, header={"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    publish(hub, "tester/liar", folder)
    said = client.run("ovsam.load('tester/liar')")
    assert re.fullmatch(rf"InputError: .+{shard.name} is not a complete safetensors file \(.+\): .+\.\n", said), said


def test_errors_are_found_before_anything_is_sent(source, head, tmp_path, monkeypatch, capsys):
    """One sentence each, exit code 2, and nothing of the Hub is touched."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    monkeypatch.setattr(pushing, "upload", lambda *a: pytest.fail("something was sent"))

    def refused(*arguments) -> str:
        assert ovsam_cli.main(["push", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("ovsam: error: ") and err.count("\n") == 1, err
        return err

    assert "config.json" in refused(tmp_path, "tester/x")
    assert "ORG/NAME" in refused(head, "just-a-name")
    assert "ORG/NAME" in refused(head, "tester/two words")
    assert "--create-pr" in refused(head, "tester/x", "--revision", "v2", "--create-pr")
    assert "hf auth login" in refused(head, "tester/x")

    other = tmp_path / "clip"
    tiny_model().config.clip_config.save_pretrained(other)
    assert "must be an OVSam model or" in refused(other, "tester/x")

    shards = sorted(source.glob("*.safetensors"))
    lacking = copied(source, tmp_path / "lacking")
    (lacking / shards[0].name).unlink()
    assert f"lacks the weight file {shards[0].name}" in refused(lacking, "tester/x")

    swapped = copied(source, tmp_path / "swapped")
    shutil.copy(shards[0], swapped / shards[1].name)
    assert "does not have the tensors" in refused(swapped, "tester/x")

    weights = {name: tensor.clone() for name, tensor in load_file(head / "model.safetensors").items()}
    nan = copied(head, tmp_path / "nan")
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, nan / "model.safetensors")
    assert f"NaN or infinite, such as {name}" in refused(nan, "tester/x")

    liar = copied(head, tmp_path / "liar")
    wrong_header(liar / "model.safetensors", length=1 << 60)
    assert "not a complete safetensors file" in refused(liar, "tester/x")

    monkeypatch.setattr(pushing, "MAX_FILE", 10_000)
    assert "more than the 10,000" in refused(head, "tester/x")
    monkeypatch.undo()

    fewer = copied(head, tmp_path / "fewer")
    save_file({k: v for k, v in weights.items() if k != name}, fewer / "model.safetensors")
    assert f"lacks 1 of its model's weights, such as {name}" in refused(fewer, "tester/x", "--dry-run")

    unprocessed = copied(source, tmp_path / "unprocessed")
    (unprocessed / "processor_config.json").unlink()
    assert "processor.save_pretrained()" in refused(unprocessed, "tester/x", "--dry-run")


def test_a_model_of_other_outputs_is_not_sent(head, tmp_path, monkeypatch):
    """The outputs of the folder are compared with those of its source; a difference stops the upload."""
    model, _ = pushing.open_source(head)
    pushing.save_file(pushing.answers(model), tmp_path / "reference")
    pushing.compare(model, None, str(tmp_path / "reference"), "here")
    model.scale_shift.bias.data[1] += 0.01
    with pytest.raises(SystemExit, match="^loaded here, its answer.logit_shift differs from that of the source$"):
        pushing.compare(model, None, str(tmp_path / "reference"), "here")
    with pytest.raises(SystemExit, match="float16"):
        pushing.compare(model.half(), None, str(tmp_path / "reference"), "here")

    monkeypatch.setattr(pushing, "LOAD_BACK", "raise SystemExit('loaded there, it says other things')")
    with pytest.raises(InputError, match="and was not uploaded: loaded there, it says other things.$"):
        pushing.build(head, "tester/x", tmp_path)


def test_a_dry_run_lists_the_files(head, tmp_path, monkeypatch, capsys):
    """The same checks, and nothing of the Hub."""
    monkeypatch.setattr(pushing, "load_back", lambda *a, **k: None)
    monkeypatch.setattr(pushing, "get_token", lambda: pytest.fail("the token was asked for"))
    plain = copied(head, tmp_path / "plain")
    (plain / "README.md").unlink()
    arguments = ["push", str(plain), "tester/x", "--dry-run", "--private", "--create-pr"]
    assert ovsam_cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("a pull request to tester/x (private):\n") and "nothing was sent" in said
    size = (head / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors +{size:,} bytes", said) and "modeling_ovsam.py" in said
    assert "has no licence" in said


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("# No front matter\n", "it is empty"),
        ("---\nlicense: [\n---\n", "not valid"),
        ("---\nlicense: other\n---\n", "license_name"),
        ("---\nlicense: mit\nbase_model: two words/x\n---\n", "base_model"),
        ("---\nlicense: mit\nlanguage: English\n---\n", "ISO 639"),
        ("---\nlicense: mit\ntags: {a: b}\n---\n", "tags"),
        ("---\nlicense: mit\nmodel-index:\n- name: x\n  results:\n  - task: {type: y}\n---\n", "model_index"),
        (CARD + "![failures](failures.jpg)\n", "failures.jpg"),
        (CARD + "[out](../README.md)\n", "README.md"),
    ],
)
def test_cards_that_the_hub_rejects(card, problem, tmp_path):
    with pytest.raises(InputError, match=problem) as caught:
        check_card(card, tmp_path)
    assert "\n" not in str(caught.value)


PUBLISHED = ["hub/ovsam-tiny", "adapters/clip2sam-tiny", "adapters/concepts-tiny", "adapters/sam2clip-tiny"]


@pytest.mark.weights
def test_a_mirror_is_sent_as_it_is(tmp_path, monkeypatch):
    """To the byte, so that --check holds for the files on the Hub too."""
    monkeypatch.setattr(pushing, "answers", lambda *a: {})
    monkeypatch.setattr(pushing, "load_back", lambda *a, **k: None)
    mirror = ROOT / "hub" / "ovsam-tiny"
    built = pushing.build(mirror, "tester/ovsam-tiny", tmp_path)
    assert set(built.files()) == {path.name for path in mirror.iterdir()} and not built.left_out
    assert all((built.folder / name).read_bytes() == (mirror / name).read_bytes() for name in built.files())


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_cards(published):
    """The Hub accepts them, and their figures are those of model_card.md."""
    folder = ROOT / published
    text = (folder / "README.md").read_text()
    check_card(text, folder)
    data = ModelCard(text).data
    for key in ("license", "library_name", "pipeline_tag", "tags", "base_model", "datasets", "language"):
        assert getattr(data, key), key
    source = ModelCard((ROOT / "model_card.md").read_text()).data.eval_results
    measured = {result.metric_name: result.metric_value for result in source}
    results = data.eval_results or []  # an adapter's card may leave its figures to the whole model's
    assert {result.metric_name: result.metric_value for result in results}.items() <= measured.items()
    assert {result.metric_type for result in results} == set(data.metrics or [])
    assert measured and (data.model_name == folder.name or not results)


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("card", ["model_card.md", *(f"{folder}/README.md" for folder in PUBLISHED[1:])])
def test_code_of_the_cards_runs(card, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / card).read_text(), re.S)
    photo = ROOT / "tests" / "data" / "photos-val" / "images" / "000000116740.jpg"  # a street
    for name in re.findall(r'"([\w-]+\.jpg)"', code):
        shutil.copy(photo, tmp_path / name)
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    if card == "model_card.md":
        assert len(names["found"]) > 0 and names["found"][0].label in capsys.readouterr().out
    else:
        (adapter,) = (value for value in names.values() if isinstance(value, torch.nn.Module))
        assert not adapter.training
