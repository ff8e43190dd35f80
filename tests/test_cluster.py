"""Cluster files are checked offline and strictly: each misspelt key is an error here, for a cluster would drop it."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fac_ray.config import load_config
from fac_ray.doctor import required_versions

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
IMAGE_FOLDER = "/home/ray/fac_ray"
MANIFESTS = ["job", "service"]
FREE_MAPS = {"rayStartParams", "labels"}
"""Maps whose keys Ray or the user chooses."""


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / f"{name}.yaml").read_text()))


def ray_object(name: str) -> dict[str, Any]:
    return next(document for document in manifests(name) if document["kind"].startswith("Ray"))


def ray_cluster_spec(name: str) -> dict[str, Any]:
    spec = ray_object(name)["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def groups(name: str) -> list[dict[str, Any]]:
    spec = ray_cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def misspelt(document: Any) -> Iterator[tuple[str, Any]]:
    """The document with one key misspelt, for every key in turn; free maps are left alone."""
    for path in key_paths(document):
        mutant = copy.deepcopy(document)
        node = mutant
        for step in path[:-1]:
            node = node[step]
        node[f"{path[-1]}x"] = node.pop(path[-1])
        yield ".".join(map(str, path)), mutant


def key_paths(node: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(node, dict):
        for key, value in node.items():
            if not (path and path[-1] in FREE_MAPS):
                yield (*path, key)
            yield from key_paths(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from key_paths(value, (*path, index))


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def kuberay():
    schema = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_known_keys_only(kuberay, name):
    for document in manifests(name):
        jsonschema.validate(document, kuberay.schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_misspelt_key_of_a_manifest_is_refused(kuberay, name):
    missed = [path for document in manifests(name) for path, mutant in misspelt(document) if kuberay.is_valid(mutant)]
    assert missed == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_gets_the_memory_it_asks_for_and_may_not_be_root(name):
    for group in groups(name):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["terminationGracePeriodSeconds"] > 30  # Ray drains for up to 30 s
        for container in pod["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_mount_has_its_volume_and_ray_its_shared_memory(name):
    for group in groups(name):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) == set(volumes)
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_computes_nothing_and_strangers_stay_out(name):
    spec = ray_cluster_spec(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["rayVersion"] == required_versions()["ray"]


def test_gpu_workers_of_a_run_start_from_none_and_tolerate_gpu_nodes():
    gpu = next(group for group in ray_cluster_spec("job")["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert (gpu["minReplicas"], gpu["replicas"]) == (0, 0)
    pod = gpu["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" in [toleration["key"] for toleration in pod["tolerations"]]


def test_the_driver_has_a_worker_to_run_on():
    spec = ray_object("job")["spec"]
    cpus = [
        int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
        if group["minReplicas"] > 0
    ]
    assert spec["entrypointNumCpus"] <= max(cpus)


def test_the_entrypoint_is_a_job_of_the_image_with_a_config_that_loads():
    words = shlex.split(ray_object("job")["spec"]["entrypoint"])
    files = [ROOT / Path(word).relative_to(IMAGE_FOLDER) for word in words if word.startswith(IMAGE_FOLDER)]
    assert [path.is_file() for path in files] == [True, True]
    overrides = tuple(words[i + 1] for i, word in enumerate(words) if word == "--set")
    config = load_config(files[1], overrides)
    assert config.run.folder is not None
    assert config.run.folder.startswith("/shared/")


def test_the_runtime_environment_is_one_that_ray_accepts():
    from ray.runtime_env import RuntimeEnv

    given = yaml.safe_load(ray_object("job")["spec"]["runtimeEnvYAML"])
    assert set(given) <= {"env_vars"}
    assert RuntimeEnv(**given).env_vars() == given["env_vars"]


def test_a_manifest_holds_no_secret_but_names_it():
    for name in MANIFESTS:
        for group in groups(name):
            for container in group["template"]["spec"]["containers"]:
                for variable in container.get("env", []):
                    assert "value" not in variable or not re.search("TOKEN|SECRET|PASSWORD|KEY", variable["name"])


# ---- Ray's cluster launcher ----


def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "aws.yaml").read_text())


def accepted(tree: dict[str, Any]) -> bool:
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(tree)))
    except (jsonschema.ValidationError, KeyError, ValueError):
        return False
    return True


def test_the_launcher_accepts_its_file():
    assert accepted(launcher())


@pytest.mark.parametrize(
    "path",
    ["max_workers", "docker", "file_mounts", "head_start_ray_commands", "available_node_types.gpu-spot.min_workers",
     "available_node_types.gpu-spot.labels", "available_node_types.head.resources"],
)  # fmt: skip
def test_a_misspelt_key_of_the_launcher_is_refused(path):
    mutant = dict(misspelt(launcher()))[path]
    assert not accepted(mutant)


def test_launched_nodes_authenticate_and_the_head_computes_nothing():
    tree = launcher()
    for command in (*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in command
    assert "--num-cpus=0" in tree["head_start_ray_commands"][0]
    assert tree["available_node_types"][tree["head_node_type"]]["resources"] == {"CPU": 0}
    assert any(target.endswith("auth_token") for target in tree["file_mounts"])


def test_spot_nodes_come_first_and_can_be_replaced_by_others():
    types = launcher()["available_node_types"]
    spot, sure = types["gpu-spot"], types["gpu-ondemand"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in sure["node_config"]
    assert spot["priority"] > sure["priority"]
    assert spot["labels"] == sure["labels"]
    assert spot["min_workers"] == sure["min_workers"] == 0


def test_no_more_workers_are_allowed_than_the_cluster_takes():
    tree = launcher()
    assert sum(kind.get("max_workers", 0) for kind in tree["available_node_types"].values()) == tree["max_workers"]


# ---- The image ----


def instructions() -> list[tuple[str, str]]:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_built_on_the_pinned_ray():
    base = dict(instructions())["FROM"]
    assert base.startswith(f"rayproject/ray:{required_versions()['ray']}-py311")


def test_the_image_ends_as_a_user_without_rights():
    last_user = [value for name, value in instructions() if name == "USER"][-1]
    assert last_user.isdecimal()
    assert int(last_user) > 0


def test_the_image_holds_what_the_files_need_and_nothing_else():
    copied = {
        source
        for name, value in instructions()
        if name == "COPY"
        for source in [word for word in value.split() if not word.startswith("--")][:-1]
    }
    assert copied == {"pyproject.toml", "README.md", "fac_ray", "jobs", "serve"}
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert kept == copied


def test_no_secret_is_built_into_the_image():
    for name, value in instructions():
        if name in ("ENV", "ARG"):
            assert not re.search(r"(TOKEN|SECRET|PASSWORD|KEY)\w*=", value)


def test_all_files_name_one_image():
    text = "".join(path.read_text() for path in CLUSTER.rglob("*.yaml"))
    assert len(set(re.findall(r"image: (\S+)", text))) == 1
