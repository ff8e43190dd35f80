"""The service scores as the batch does, refuses what it must refuse, and its config file has no misspelt key.

The run that it serves is made here: a random two-block Llama over bytes, an SAE of 32 features, a few texts.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import get_args

import httpx
import numpy as np
import pyarrow as pa
import pytest
import yaml
from processes import ray_folder
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fac_ray.artifacts import MARKER, write_json, write_table
from fac_ray.config import RunConfig, config_from_tree
from fac_ray.coverage.counts import CorpusCoverage, FeatureCounts
from fac_ray.coverage.gaps import find_gaps
from fac_ray.coverage.reduction import save_coverage
from fac_ray.features.extractor import FeatureExtractor
from fac_ray.schema import FEATURES, SAMPLES
from fac_ray.scoring import load_finished_run, score_sample
from serve.gate import Gate

ROOT = Path(__file__).parent.parent
SEED = ["Where is my parcel?", "My parcel is late."]
ANCHOR = [*SEED, "Send me the money back at once!", "I want to speak to a lawyer 12345", "%%% ###"]
TEXTS = ["Where is my parcel?", "money back 99", "a", "I want to speak to a lawyer 12345 " * 40]
CHAT = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "In Rome."}]
LIMITS = {"max_samples": 8, "max_characters": 2000}
TOKEN = "a token for this test"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run that has come to its gaps; half of the features are relevant."""
    folder = tmp_path_factory.mktemp("run")
    config = write_model(folder)
    extractor = FeatureExtractor(config.model, config.sae, config.measure, "cpu")
    anchor, seed = (coverage(extractor, texts, config) for texts in (ANCHOR, SEED))
    features = pa.Table.from_pylist(
        [
            {"feature_id": i, "relevant": i % 2 == 0, "method": "statistical", "effect": 1.0 + i}
            for i in range(extractor.d_sae)
        ],
        schema=FEATURES,
    )
    gaps = find_gaps(features, anchor, seed, {}, config.measure.threshold)
    assert gaps.num_rows > 1, "a world without gaps tests nothing"
    save_coverage(folder / "coverage" / "anchor", anchor)
    save_coverage(folder / "coverage" / "seed", seed)
    write_table(folder / "relevance" / "features.parquet", features)
    write_table(folder / "gaps" / "gaps.parquet", gaps)
    write_json(folder / "gaps" / MARKER, {"fingerprint": "x", "facts": {}})
    write_json(folder / "config.json", config.model_dump(mode="json"))
    return folder


def write_model(folder: Path) -> RunConfig:
    """A random language model over bytes and a Top-K SAE, in their usual formats."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {"<s>": 0, **{char: i + 1 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)).save_pretrained(
        folder / "model"
    )
    weights = {"W_enc": torch.randn(16, 32), "b_enc": torch.zeros(32), "W_dec": torch.randn(32, 16)}
    (folder / "sae").mkdir()
    save_file({**weights, "b_dec": torch.zeros(16)}, folder / "sae" / "sae_weights.safetensors")
    settings = {"architecture": "topk", "d_in": 16, "d_sae": 32, "k": 2, "metadata": {"sae_lens_version": "6.54.12"}}
    write_json(folder / "sae" / "cfg.json", settings)
    return config_from_tree(
        {
            "name": "tiny",
            "model": {"path": str(folder / "model"), "hook_layer": 1},
            "sae": {"path": str(folder / "sae")},
            "corpora": {"anchor": {"path": "a"}, "seed": {"path": "b"}},
            "measure": {"threshold": 0.02, "thresholds": [0.02]},
        }
    )


def coverage(extractor: FeatureExtractor, texts: list[str], config: RunConfig) -> CorpusCoverage:
    rows = [{"sample_id": str(i), "text": text} for i, text in enumerate(texts)]
    activations = extractor.extract_table(pa.Table.from_pylist(rows, schema=SAMPLES))
    grid, threshold = config.measure.grid, config.measure.threshold
    unlabelled = np.full(len(texts), -1)
    return CorpusCoverage.from_counts(
        FeatureCounts.from_rows(activations, unlabelled, grid, threshold, extractor.d_sae)
    )


# ---- over HTTP, as `serve run` starts it ----


class Client:
    """What a client of the service does, over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def send(self, path: str, body: object = None, token: str | None = TOKEN) -> tuple[int, dict]:
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def service(run_folder):
    """The real application in a Ray of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ray_folder() as folder:
        config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        config["http_options"]["port"] = port
        config["applications"][0]["args"] = {"run": str(run_folder), **LIMITS}
        config["applications"].append(narrow(config["applications"][0]))
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        with (Path(folder) / "log").open("w+") as log:
            process = start_service(path, Path(folder), log)
            try:
                yield wait_until_ready(Client(f"http://127.0.0.1:{port}"), process, Path(folder) / "log")
            finally:
                process.terminate()
                process.wait(60)


def narrow(application: dict) -> dict:
    """The same application under /narrow, with room for one request in work and one that waits."""
    (ingress, scorer) = application["deployments"]
    limits = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    return {**application, "name": "narrow", "route_prefix": "/narrow", "deployments": [ingress, {**scorer, **limits}]}


def start_service(config: Path, folder: Path, log) -> subprocess.Popen:
    """`serve run` with a private Ray in its own folder; nothing of an outer Ray is inherited."""
    code = (
        "import ray, sys; from ray.serve.scripts import cli\n"
        f"ray.init(address='local', num_cpus=8, include_dashboard=False, object_store_memory=100 << 20,"
        f" _temp_dir={str(folder)!r})\n"
        "sys.argv = ['serve', 'run', '--app-dir', '.', sys.argv[1]]; cli()"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env = {**inherited, "RAY_AUTH_MODE": "disabled", "FAC_RAY_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, str(config)], cwd=ROOT, env=env, stdout=log, stderr=log)


def wait_until_ready(client: Client, process: subprocess.Popen, log: Path) -> Client:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if client.send("/healthz", token=None) == (200, {"status": "ok"}):
                return client
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def test_the_service_scores_as_the_extractor_does(service, run_folder):
    run = load_finished_run(run_folder)
    extractor = FeatureExtractor(run.config.model, run.config.sae, run.config.measure, "cpu")
    expected = [score_sample(run, one) for one in extractor.extract([(text, None) for text in TEXTS])]
    status, answer = service.send("/v1/score", {"texts": TEXTS})
    assert status == 200
    assert [approximately(item) for item in expected] == answer["items"]
    assert (answer["run"], answer["threshold"], answer["preset"]) == ("tiny", 0.02, "corrected")
    assert answer["together"]["num_measured"] == len(TEXTS)


def approximately(score: dict) -> dict:
    """The same score with activations as they come out of another batch."""
    missing = [{**one, "activation": pytest.approx(one["activation"], rel=1e-4)} for one in score["missing_features"]]
    return {**score, "missing_features": missing}


def test_a_chat_is_scored_as_a_chat(service, run_folder):
    run = load_finished_run(run_folder)
    extractor = FeatureExtractor(run.config.model, run.config.sae, run.config.measure, "cpu")
    (features,) = extractor.extract([("Where is my parcel?\n\nIn Rome.", CHAT)])
    status, answer = service.send("/v1/score", {"chats": [CHAT]})
    assert status == 200
    assert answer["items"] == [approximately(score_sample(run, features))]


def test_gaps_come_in_pages_by_rank(service, run_folder):
    ranks = load_finished_run(run_folder).gaps["rank"].to_pylist()
    status, answer = service.send("/v1/gaps?offset=1&limit=2")
    assert status == 200
    assert [gap["rank"] for gap in answer["gaps"]] == ranks[1:3]
    assert answer["num_gaps"] == len(ranks)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"texts": []}, 422, "no item"),
        ({"texts": ["fine", "  "]}, 422, "item 1 is empty"),
        ({"texts": ["a"] * 9}, 413, "9 items; a request holds 1 to 8"),
        ({"texts": ["a" * 2001]}, 413, "2,001 characters"),
        ({"texts": ["a"], "chats": [CHAT]}, 422, "either"),
        ({}, 422, "either"),
        ({"texts": "a"}, 422, "body.texts"),
        ({"texts": [3]}, 422, "body.texts.0"),
        ({"chats": [[{"role": "user"}]]}, 422, "body.chats.0.0.content"),
        ({"texts": ["a"], "treshold": 2}, 422, "body.treshold"),
        (b"{", 422, "JSON"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(service, body, status, reason):
    found, answer = service.send("/v1/score", body)
    assert found == status
    assert set(answer) == {"error"}
    assert reason in answer["error"]


def test_only_the_token_opens_the_service(service):
    for token in (None, "wrong", TOKEN + "x"):
        assert service.send("/v1/gaps", token=token)[0] == 401
    assert service.send("/healthz", token=None)[0] == 200


def test_an_unknown_path_is_refused_in_the_same_shape(service):
    assert service.send("/v2/score") == (404, {"error": "Not Found"})


def test_many_requests_at_once_each_get_their_own_answer(service):
    async def send_all():
        async with httpx.AsyncClient(base_url=service.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            bodies = [{"texts": ["x" * (n + 1)] * (1 + n % 3)} for n in range(24)]
            return await asyncio.gather(*(client.post("/v1/score", json=body, timeout=60) for body in bodies))

    answers = asyncio.run(send_all())
    assert [answer.status_code for answer in answers] == [200] * 24
    sizes = [[item["num_tokens"] for item in answer.json()["items"]] for answer in answers]
    assert sizes == [[n + 1] * (1 + n % 3) for n in range(24)]


def test_a_full_queue_answers_429_and_says_when_to_come_back(service):
    async def send_all():
        async with httpx.AsyncClient(base_url=service.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            body = {"texts": ["I want to speak to a lawyer"] * 8}
            return await asyncio.gather(*(client.post("/narrow/v1/score", json=body, timeout=60) for _ in range(24)))

    answers = asyncio.run(send_all())
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert set(answer.json()) == {"error"}


# ---- without a cluster ----


def test_a_body_is_refused_before_it_is_read_whole():
    async def size(request: Request) -> JSONResponse:
        return JSONResponse(len(await request.body()))

    app = Starlette(routes=[Route("/", size, methods=["POST"])], middleware=[Middleware(Gate, max_body_bytes=10)])
    client = TestClient(app)
    assert client.post("/", content=b"x" * 10).json() == 10
    declared = client.post("/", content=b"x" * 11)
    assert (declared.status_code, list(declared.json())) == (413, ["error"])
    streamed = client.post("/", content=iter([b"x" * 6, b"x" * 6]))
    assert streamed.status_code == 413


def test_a_request_never_exceeds_a_batch():
    from serve.app import BATCH_SAMPLES, AppArgs

    with pytest.raises(ValidationError):
        AppArgs(run="r", max_samples=BATCH_SAMPLES + 1)


@pytest.mark.parametrize("source", ["serve/config.yaml", "cluster/kuberay/service.yaml"])
def test_the_serve_config_is_valid_and_has_known_keys_only(source):
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(source)
    assert unknown_keys(config, ServeDeploySchema) == []
    checked = ServeDeploySchema.model_validate(config)
    from serve.app import AppArgs

    AppArgs.model_validate(checked.applications[0].args)
    assert {deployment.name for deployment in checked.applications[0].deployments} == {"Ingress", "Scorer"}


def test_a_misspelt_key_of_the_serve_config_is_found():
    from ray.serve.schema import ServeDeploySchema

    config = serve_config("serve/config.yaml")
    config["applications"][0]["deployments"][1]["max_ongoing_request"] = 4
    config["http_options"]["prt"] = 1
    config["applications"][0]["deployments"][1]["autoscaling_config"]["max_replica"] = 4
    assert set(unknown_keys(config, ServeDeploySchema)) == {
        "http_options.prt",
        "applications.0.deployments.1.max_ongoing_request",
        "applications.0.deployments.1.autoscaling_config.max_replica",
    }


def serve_config(source: str) -> dict:
    tree = yaml.safe_load((ROOT / source).read_text())
    return yaml.safe_load(tree["spec"]["serveConfigV2"]) if "spec" in tree else tree


def unknown_keys(value: object, kind: object, path: str = "") -> list[str]:
    """Keys that the schema does not know; Serve would drop them without a word."""
    if isinstance(value, list):
        return [key for i, item in enumerate(value) for key in unknown_keys(item, kind, f"{path}{i}.")]
    if not isinstance(value, dict):
        return []
    models = [one for one in nested_types(kind) if isinstance(one, type) and issubclass(one, BaseModel)]
    if not models:
        return []
    fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
    found = []
    for key, item in value.items():
        found += unknown_keys(item, fields[key], f"{path}{key}.") if key in fields else [f"{path}{key}"]
    return found


def nested_types(kind: object) -> list[object]:
    """The type itself and all types in its brackets."""
    return [kind, *(inner for argument in get_args(kind) for inner in nested_types(argument))]
