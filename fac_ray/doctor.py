"""Whether this machine can do a run: one check after another, each with what was found and what to do about it.

Libraries are started in a process of their own with a time limit, so that a broken one can neither take the doctor
down nor keep it waiting. Nothing here imports torch or ray.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = ("ray", "torch", "transformers", "sae-lens", "vllm", "deepspeed", "pyarrow")
IMPORT_LIMIT_S = 180.0
DEEP_LIMIT_S = 420.0
GIB = 1 << 30

# What each library must be able to do. `quick` runs by default, `deep` with `--deep`.
QUICK = {
    "ray": "from fac_ray.doctor import start_ray; start_ray()",
    "torch": "import torch; (torch.ones(2, 2) @ torch.ones(2, 2)).sum().item(); print('computes')",
    "sae-lens": "import sae_lens; print('imports')",
    "vllm": "from vllm import LLM; print('imports')",
    "deepspeed": "import deepspeed; print('imports')",
}
DEEP = {
    "vllm engine": "from fac_ray.doctor import start_vllm; start_vllm()",
    "deepspeed engine": "from fac_ray.doctor import start_deepspeed; start_deepspeed()",
}
INSTALL = "install the lock file as docs/install.md says; single upgrades break the set"
ADVICE = {
    "ray": "look at the newest folder under /tmp/ray; a run needs free ports on the loopback and space in /dev/shm",
    "sae-lens": "a torchvision or torchaudio that does not match torch breaks this import: uninstall them",
    "vllm": "pip install 'fac-ray[cpu]' without a GPU, 'fac-ray[gpu]' with one; or give `synthesis: null`",
    "vllm engine": "run `fac-ray --verbose doctor --deep` and read the last lines",
}


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    advice: str = ""
    """What to do; empty if there is nothing to do."""
    needed: bool = True
    """Whether a run cannot do without it."""


def examine(folder: Path = Path("."), deep: bool = False) -> list[Check]:
    """Every check, in the order to read them. `folder`: where runs will be written; `deep`: engines really start."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        starts = {name: pool.submit(check_start, name, code, IMPORT_LIMIT_S) for name, code in QUICK.items()}
        checks = [check_python(), *(check_version(package) for package in PACKAGES)]
        checks += [check_cores(), check_memory(), check_gpus(), check_disk(folder), check_shared_memory()]
        checks += [future.result() for future in starts.values()]
    if deep:  # one at a time: each takes most of the memory
        checks += [check_start(name, code, DEEP_LIMIT_S) for name, code in DEEP.items()]
    return checks


def check_python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), found, "use Python 3.11 or newer")


def check_version(package: str) -> Check:
    """Whether the package is installed at the version that was tested with the rest."""
    found = installed_version(package)
    wanted = required_versions().get(package)
    if found is None:
        return Check(f"{package} version", False, "not installed", INSTALL)
    matches = wanted is None or found.split("+")[0] == wanted
    advice = "" if matches else f"tested with {wanted}; {INSTALL}"
    return Check(f"{package} version", matches, found, advice, needed=False)


def installed_version(package: str) -> str | None:
    """Version of an installed package; vLLM's build for the CPU counts as vLLM."""
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def required_versions() -> dict[str, str]:
    """Exact versions that fac-ray pins."""
    pins = {}
    for requirement in metadata.requires("fac-ray") or []:
        name, equals, version = requirement.split(";")[0].partition("==")
        if equals:
            pins[name.split("[")[0].strip()] = version.strip()
    return pins


def check_cores() -> Check:
    cores = os.cpu_count() or 1
    return Check("cores", cores >= 2, str(cores), "two cores or more, or a run takes very long", needed=False)


def check_memory() -> Check:
    """Memory of this machine, or of its container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    return Check("memory", total >= 8 * GIB, f"{total / GIB:.1f} GiB", "8 GiB or more for the whole reference run")


def check_gpus() -> Check:
    """GPUs that the driver reports; a run without one is slow, not wrong."""
    if shutil.which("nvidia-smi") is None:
        return Check("gpus", True, "none: everything runs on the CPU", needed=False)
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    found = "; ".join(line.strip() for line in listed.stdout.splitlines() if line.strip())
    ok = listed.returncode == 0 and bool(found)
    return Check(
        "gpus", ok, found or "nvidia-smi lists none", "" if ok else "mend the driver, or hide it", needed=False
    )


def check_disk(folder: Path) -> Check:
    """Free space where runs are written."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    return Check("disk", free >= 5 * GIB, f"{free / GIB:.1f} GiB free in {existing}", "free 5 GiB, or give --folder")


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    """Size of the shared memory in which Ray keeps objects and vLLM talks to its workers."""
    if not path.is_dir():
        return Check("shared memory", False, f"{path} is missing", "Ray falls back to the disk", needed=False)
    size = shutil.disk_usage(path).total
    advice = "in a container: --shm-size=4g (docker), or an emptyDir with medium Memory (Kubernetes)"
    return Check("shared memory", size >= 2 * GIB, f"{size / GIB:.1f} GiB in {path}", advice, needed=False)


def check_start(name: str, code: str, limit_s: float) -> Check:
    """Whether Python code ends well in a process of its own; what it prints last is what was found."""
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Check(name, False, f"no answer in {limit_s:.0f} s", ADVICE.get(name, INSTALL))
    if ended.returncode == 0:
        return Check(name, True, _last_line(ended.stdout) or "starts")
    return Check(name, False, _last_line(ended.stderr) or f"exit code {ended.returncode}", ADVICE.get(name, INSTALL))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def start_ray() -> None:
    """Start the private cluster that a command works on, and let a worker answer."""
    from fac_ray.session import ray_session

    with ray_session():
        import ray

        answer = ray.get(ray.remote(lambda: "a worker answers").remote())
    _say(answer)


def start_vllm() -> None:
    """Start the engine that synthesis uses, on the embedded model, and let it write a few tokens."""
    from tempfile import TemporaryDirectory

    from fac_ray.reference import default_config
    from fac_ray.schema import Message
    from fac_ray.synthesis.generation import ENGINE_ENV, GenerationRequest, Generator

    os.environ.update(ENGINE_ENV)
    with TemporaryDirectory() as folder:
        config = default_config(Path(folder))
        assert config.synthesis is not None, "the embedded run synthesizes"
        generator = Generator(config.synthesis, config.model)
        prompt: list[Message] = [{"role": "user", "content": "refund"}]
        texts = generator.generate([GenerationRequest(prompt, seed=0, temperature=0.8, top_p=0.9, max_new_tokens=8)])
        generator.shutdown()
    _say(f"wrote {len(texts[0])} characters")


def start_deepspeed() -> None:
    """Start the engine that training uses, in one process, on a tiny model, and take one optimizer step."""
    from tempfile import TemporaryDirectory

    import torch

    from fac_ray.config import TrainingConfig
    from fac_ray.training.engine import start_engine

    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, by g++
    with TemporaryDirectory() as folder:
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        engine = start_engine(torch.nn.Linear(7, 1), TrainingConfig(batch_size=2), num_steps=1)
        loss = engine(torch.ones(2, 7, device=engine.device)).sum()
        engine.backward(loss)
        engine.step()
        torch.distributed.destroy_process_group()
    _say(f"takes a step on {engine.device}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
