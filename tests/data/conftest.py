import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from guided_distill import places


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "guided_distill"


@pytest.fixture
def own_datasets(tmp_path_factory, monkeypatch):
    """A cache of the library datasets of its own, for this process and those that it starts."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


class _Bucket(DirFileSystem):
    """gs://NAME/... is a folder of this machine, given by `root`."""

    protocol = ("gcs", "gs")
    root = ""
    cachable = False

    def __init__(self, **options):
        super().__init__(self.root, LocalFileSystem())

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("gs://").rstrip("/")

    def _join(self, path):
        return super()._join(self._strip_protocol(path))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that gs://bucket stands for."""
    monkeypatch.setattr(places, "find_spec", lambda name: name)
    monkeypatch.setattr(_Bucket, "root", str(tmp_path))
    systems = {"gcs": _Bucket(), "file": LocalFileSystem()}
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", systems.get)
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"
