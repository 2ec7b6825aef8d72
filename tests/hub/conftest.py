"""Fixtures for tests with the real Hub client against a Hub on this machine; nothing leaves the loopback interface."""

import itertools
import os
import subprocess
import sys
import venv
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from server import WRITE_TOKEN, Hub


REPOSITORY = Path(__file__).parents[2]
PROXIES = {f"{scheme}_proxy" for scheme in ("http", "https", "all")}


@pytest.fixture(scope="session")
def hub():
    """The running `Hub`: `hub.url`, `hub.files(name)`, `hub.repositories`, `hub.requests`, `hub.failing(...)`.

    One serves all tests; `repo_id` keeps them apart. Whatever a test sets on it, it must set back.
    """
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def make_repo_id():
    """Function that returns a name, "user/...", that no repository has yet; "user" is who `WRITE_TOKEN` belongs to."""
    counter = itertools.count()
    return lambda name="model": f"user/{name}-{next(counter)}"


@pytest.fixture
def repo_id(make_repo_id):
    """A name for this test's repository, which does not exist yet."""
    return make_repo_id()


@pytest.fixture(scope="session")
def make_environment(hub, tmp_path_factory):
    """Function that returns a child process's environment variables: `make_environment(token=WRITE_TOKEN, **others)`.

    The child's Hub is `hub`, its cache (HF_HOME) a new empty folder, unless given. `token=None` is nobody.
    """

    def make(token: str | None = WRITE_TOKEN, **variables: object) -> dict[str, str]:
        environment = {
            key: value
            for key, value in os.environ.items()
            # Also away: other caches, other tokens, offline mode.
            if key.lower() not in PROXIES and not key.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))
        }
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
            "HF_HUB_DISABLE_XET": "1",  # the server does not speak it
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment | {key: str(value) for key, value in variables.items()}

    return make


@pytest.fixture(scope="session")
def run_python(make_environment):
    """Function that runs Python with the given arguments in a child process whose Hub is `hub`.

    `run_python("-c", code, *arguments)` or `run_python("trainer_scripts/script.py", ...)`, in the repository's root
    with this interpreter. `python=bare_python` takes the one without the package, and runs in `/` without PYTHONPATH.
    `token` and further environment `variables` (say `HF_HOME=folder`) are those of `make_environment`. With
    `check=True`, a failed child fails the test, with what it said.
    """

    def run(
        *arguments: object,
        python: Path | str = sys.executable,
        token: str | None = WRITE_TOKEN,
        check: bool = False,
        **variables: object,
    ) -> subprocess.CompletedProcess:
        environment = make_environment(token, **variables)
        bare = str(python) != sys.executable
        if bare:
            environment.pop("PYTHONPATH", None)
        process = subprocess.run(
            [str(python), *map(str, arguments)],
            cwd="/" if bare else REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,  # nobody answers whether remote code is to be trusted
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or process.returncode == 0, f"{process.stdout}\n{process.stderr}"
        return process

    return run


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter with the packages of this one, but without `modeling_grassmann`, however that is installed.

    It is for checkpoints that have to load where the package is not installed: `run_python(..., python=bare_python)`.
    """
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    # Links to all that is installed, place by place. No .pth file comes along: one may lead to an editable package.
    places = [Path(place) for place in sys.path if any(Path(place).glob("*.dist-info"))]
    links = [folder / f"packages_{i}" for i in range(len(places))]
    for place, link in zip(places, links):
        link.mkdir()
        for entry in place.iterdir():
            if "modeling_grassmann" not in entry.name and entry.suffix != ".pth":
                (link / entry.name).symlink_to(entry)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "packages.pth").write_text("".join(f"{link}\n" for link in links))
    code = "import importlib.util as u; print(u.find_spec('transformers') is None, u.find_spec('modeling_grassmann'))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = subprocess.run([python, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "None"], answer.stdout
    return python


@pytest.fixture
def make_client(hub, monkeypatch):
    """Function that returns an `HfApi` for `hub` in this process: `make_client(token=WRITE_TOKEN)`; `False` is nobody.

    Transformers reads the Hub's address when it is imported: what goes through it needs a child process.
    """
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(constants, name, True)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()  # the client's connections know the proxies of their time
    yield lambda token=WRITE_TOKEN: HfApi(endpoint=hub.url, token=token)
    huggingface_hub.close_session()
