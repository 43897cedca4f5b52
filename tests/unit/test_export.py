"""igd export, igd push and the model card: files that other tools read, and a fake hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import peft
import pytest
import tiny_run
import torch
import transformers
import yaml
from huggingface_hub import ModelCard

from igd_ds.backbones.saved import (
    DESCRIPTION_FILE,
    base_record,
    describe,
    origin_of,
    weights_sha256,
    write_manifest,
)
from igd_ds.commands import export as export_command
from igd_ds.commands import push as push_command
from igd_ds.commands.export import flashrec_codes, nested_trie
from igd_ds.errors import UsageError
from igd_ds.evaluation.model_card import model_card, write_model_card
from igd_ds.evaluation.recommender import Recommender
from igd_ds.folders import write_json


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tiny_run.make(tmp_path_factory.mktemp("trained"))
    settings = {"objective": "igd", "lora_r": 0, "seed": 7, "output_dir": str(run)}
    settings |= yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    write_manifest(run / "model")
    return run


def export(run, output, *flags):
    assert export_command.main([str(run), "--output", str(output), *flags]) == 0


# ---- igd export


def test_generate_with_the_exported_files_gives_the_toolkits_lists(run, tmp_path):
    """The five lines of the exported README, with transformers alone, against the toolkit."""
    export(run, tmp_path / "e")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "e/model")
    prompt = json.loads((tmp_path / "e/prompt.json").read_text())
    page = (tmp_path / "e/README.md").read_text()
    code = page.split("```python\n")[1].split("model.generate")[0]
    tokens = torch.tensor([prompt["token_ids"]])
    scope = {"json": json, "prompt_length": tokens.shape[1]}
    exec(code.replace("trie.json", str(tmp_path / "e/trie.json")), scope)

    # The function allows what the toolkit's trie allows, at every node.
    recommender = Recommender.load(run)
    trie = recommender.stored.trie
    paths = {0: []}
    for node in range(1, trie.num_nodes):
        paths[node] = [*paths[int(trie.parent[node])], int(trie.token[node])]
    eos = recommender.stored.catalogue.eos_token_id
    for node, path in paths.items():
        children = trie.token[trie.child_begin[node] : trie.child_begin[node + 1]].tolist()
        found = scope["allowed"](0, torch.tensor([*prompt["token_ids"], *path]))
        assert sorted(found) == (sorted(children) or [eos])

    out = model.generate(
        tokens, num_beams=5, num_return_sequences=5, length_penalty=0.0, max_new_tokens=8,
        early_stopping="never", prefix_allowed_tokens_fn=scope["allowed"], eos_token_id=eos,
        pad_token_id=eos, do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    items = json.loads((tmp_path / "e/items.json").read_text())
    expected = recommender.recommend([prompt["history"]], k=5, alpha=0.0)[0]
    for sequence, score, place in zip(out.sequences, out.sequences_scores, expected, strict=True):
        generated = [token for token in sequence[tokens.shape[1] :].tolist() if token != eos]
        found = items[" ".join(map(str, generated))]
        assert [entry["item"] for entry in found] == list(place.source_ids)
        assert found[0]["title"] == place.title
        # transformers renormalises over the allowed tokens only if asked; fp32 sums differ in order
        assert float(score) == pytest.approx(place.score, rel=1e-4)

    with pytest.raises(UsageError, match="exists already"):
        export(run, tmp_path / "e")


def test_an_adapter_is_added_to_its_base(run, tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.AutoModelForCausalLM.from_pretrained(run / "model").save_pretrained(base)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, lora)

    adapter = tmp_path / "run"
    tiny_run.make(tmp_path)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (adapter / "model" / name).unlink()
    adapted.save_pretrained(adapter / "model")
    origin = origin_of(str(base))
    record = base_record(origin, weights_sha256(origin))
    description = describe(adapter / "model") | {"base": record}
    write_json(adapter / "model" / DESCRIPTION_FILE, description)

    export(adapter, tmp_path / "e")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "e/model")
    tokens = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        expected, found = adapted.eval()(tokens).logits, whole(tokens).logits
        with adapted.disable_adapter():
            without = adapted(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32, another order
    assert (without - expected).abs().max() > 1e-2


def test_files_of_semantic_ids(tmp_path):
    assert nested_trie([[5, 7, 0], [5, 8, 0]]) == {"5": {"7": {"0": {}}, "8": {"0": {}}}}
    # Levels may have gaps in use; a level reaches to the first token of the next one.
    codes, span, sizes = flashrec_codes([[10, 14, 20], [12, 15, 21]])
    assert codes == [[0, 0, 0], [2, 1, 1]] and (span, sizes) == ("10:21", "4,6,2")
    for path, numbers in zip([[10, 14, 20], [12, 15, 21]], codes, strict=True):
        begin = 10 + np.cumsum([0, 4, 6])
        assert path == (begin + numbers).tolist()  # as FlashRec finds the tokens again
    assert flashrec_codes([[10, 11], [12, 13]]) is None  # levels lie mixed
    assert flashrec_codes([[10], [11, 12]]) is None


# ---- the model card


def test_card_and_its_metadata(run):
    write_json(run / "summary.json", {"validation_metric": "nll", "best": 1.5, "best_step": 20})
    match = {"hr@10": 0.25, "ndcg@10": 0.125, "hr@5": 0.1}
    results = {"split": "test", "rows": 11, "alpha": {"0.2": {"item_match": match}}}
    (run / "eval" / "test").mkdir(parents=True)
    write_json(run / "eval" / "test" / "metrics.json", results)
    record = {"name": "Qwen/Qwen2.5-0.5B", "commit": "abc", "sha256": "0"}
    write_json(run / "model" / DESCRIPTION_FILE, describe(run / "model") | {"base": record})
    write_manifest(run / "model")

    text = model_card(run, run / "model")
    assert "| best validation | nll 1.5000 at step 20 |" in text
    assert "| test | 11 | 0.2 | 0.2500 | 0.1250 |" in text and "| objective | igd |" in text
    assert "igd_ds.Recommender.load(" in text
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen2.5-0.5B" and data.library_name == "igd_ds"
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("hr@10", 0.25),
        ("ndcg@10", 0.125),
    }
    assert data.eval_results[0].dataset_name == "data"

    # A card written anew leaves the model what it is.
    write_model_card(run, run / "model")
    push_command.check_run(run)


# ---- igd push


class FakeHub:
    """A server that takes the hub's calls of a commit and keeps what it was sent."""

    def __init__(self):
        self.calls, self.files, self.tokens = [], {}, set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                hub.calls.append(self.path)
                hub.tokens.add(self.headers.get("Authorization"))
                self.answer(hub.answer(self.path, body))

            def do_GET(self):
                hub.calls.append(self.path)
                self.answer(None)

            def answer(self, content):
                data = json.dumps(content or {"error": "forbidden"}).encode()
                self.send_response(200 if content else 403)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if path == "/api/repos/create":
            return {"url": f"{self.url}/me/model"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            return {
                "files": [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
                ]
            }
        if path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            return {
                "success": True,
                "commitOid": "c" * 40,
                "commitUrl": f"{self.url}/me/model/commit/c",
            }
        return None


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.server.shutdown()


def push(run, hub, repo="me/model"):
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "igd_ds.cli", "push", str(run), repo]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_push_sends_all_files_in_one_commit_or_nothing(run, hub):
    done = push(run, hub)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/me/model/commit/c" in done.stdout
    assert hub.tokens == {"Bearer hf_secret"}
    assert sum("/commit/" in call for call in hub.calls) == 1
    model = run / "model"
    names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert set(hub.files) == names | {"README.md"}
    assert all(hub.files[name] == (model / name).read_bytes() for name in names - {"README.md"})
    assert hub.files["README.md"].decode() == model_card(run, model)

    # A damaged model: nothing leaves this machine.
    hub.calls.clear()
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    done = push(run, hub)
    assert done.returncode == 2 and "is not the file that was saved" in done.stderr
    weights.write_bytes(whole)
    array = model / "catalogue" / "token_ids.npy"
    content = array.read_bytes()
    array.write_bytes(content[:-4] + b"\7\7\7\7")
    with pytest.raises(UsageError, match="token_ids"):
        push_command.push(run, "me/model", private=False)
    array.write_bytes(content)
    assert hub.calls == []
    (model / "manifest.json").unlink()
    with pytest.raises(UsageError, match="nothing says whether the model is whole"):
        push_command.push(run, "me/model", private=False)
    with pytest.raises(UsageError, match="no igd_ds.json"):
        push_command.push(run.parent, "me/model", private=False)


def test_a_hub_that_refuses(run, hub):
    write_manifest(run / "model")
    hub.answer = lambda path, body: None
    done = push(run, hub)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "me/model was not changed" in done.stderr and "HF_TOKEN" in done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
