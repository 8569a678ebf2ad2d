import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
from etils import epath
from PIL import Image

from guided_distill import cli
from guided_distill.data import sources
from guided_distill.errors import UserError
from guided_distill.prepare import emoji, packages
from guided_distill.prepare.packages import NpmPackage

LIST = [
    {
        "name": "RED HEART",
        "unified": "2764-FE0F",
        "category": "Smileys",
    },
    {
        "name": "TWO RUNNERS",
        "unified": "1F3C3",
        "category": "People",
        "skin_variations": {
            "1F3FB": {"unified": "1F3C3-1F3FB"},
            "1F3FF-1F3FF": {"unified": "1F3C3-1F3FF"},
        },
    },
    {"name": "SWATCH", "unified": "1F3FB", "category": "Component"},
]
CODES = ("2764-fe0f", "1f3c3", "1f3c3-1f3fb", "1f3c3-1f3ff", "1f3fb")


def drawing(value, *, size=(64, 64), kind="png"):
    """A plain gray box on a transparent background, in the middle half of the image."""
    pixels = np.zeros((*size[::-1], 4), np.uint8)
    pixels[size[1] // 4 : -size[1] // 4, size[0] // 4 : -size[0] // 4] = [value] * 3 + [255]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, lossless=True)
    return file.getvalue()


def tarball(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on localhost; its `requests` are the requested paths."""
    root = tmp_path / "registry"
    root.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests, server.root = requests, root
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(packages.REGISTRY_VARIABLE, f"http://127.0.0.1:{server.server_port}/")
        yield server
        server.shutdown()


def publish(registry, name, content):
    """Put a tarball into the registry, and return its pinned package."""
    package = NpmPackage(name, "1.0.0", hashlib.sha512(content).hexdigest(), len(content))
    folder = registry.root / name / "-"
    folder.mkdir(parents=True)
    (folder / f"{name.split('/')[-1]}-1.0.0.tgz").write_bytes(content)
    return package


@pytest.fixture
def fake_styles(registry, monkeypatch):
    """Three packages of drawings; the third also has a name without the selector, and no runners."""
    styles = []
    for index, style in enumerate(emoji.STYLES):
        codes = CODES if index < 2 else ("2764", "2764-fe0f")
        kind, size = ("png", (64, 64)) if index < 2 else ("webp", (248, 256))
        members = {
            f"{style.folder}{code}{style.suffix}": drawing(40 * index + n, size=size, kind=kind)
            for n, code in enumerate(codes)
        }
        members["package/emoji.json"] = json.dumps(LIST).encode()
        name = f"@us/style{index}" if index == 2 else f"style{index}"
        styles.append(replace(style, package=publish(registry, name, tarball(members))))
    monkeypatch.setattr(emoji, "STYLES", tuple(styles))


@pytest.mark.usefixtures("fake_styles")
def test_captions_belong_to_their_drawings(tmp_path, registry, capsys):
    out, cache = tmp_path / "emoji.npz", tmp_path / "cache"
    command = ["prepare", "emoji", "--out", str(out), "--cache", str(cache), "--image_size", "16"]
    assert cli.main([*command, "--skin_tones"]) == 0
    assert "CC-BY-4.0" in capsys.readouterr().out
    with np.load(out) as archive:
        fields = dict(archive)
    runners = ["two runners", "two runners, light skin tone"]
    runners += ["two runners, dark skin tone and dark skin tone"]
    assert list(fields["name"]) == ["red heart", *runners] * 2 + ["red heart"]
    assert list(fields["group"]) == ["red heart"] + ["two runners"] * 3 + ["red heart"] + [
        "two runners"
    ] * 3 + ["red heart"]
    assert fields["caption"][-1] == "red heart, 3D Fluent style"
    assert list(fields["skin_tone"]) == [False, False, True, True] * 2 + [False]
    assert list(fields["class_names"][fields["label"]]) == (["Smileys"] + ["People"] * 3) * 2 + [
        "Smileys"
    ]
    middle = fields["image"][:, 8, 8, 0]
    np.testing.assert_array_equal(middle, [0, 1, 2, 3, 40, 41, 42, 43, 80])
    np.testing.assert_array_equal(fields["image"][:, 0, 0], 255)

    assert len(registry.requests) == 3
    assert cli.main(command) == 0
    assert len(registry.requests) == 3
    with np.load(out) as archive:
        assert list(archive["name"]) == ["red heart", "two runners"] * 2 + ["red heart"]
    assert sources.load_source(f"npz:{out}").shape == (16, 16, 3)


def test_a_drawing_that_is_not_square_is_centred(tmp_path):
    image = emoji._decode("x", drawing(0, size=(200, 256)), 64)
    rows, columns = (np.flatnonzero((image[..., 0] < 128).any(axis=axis)) for axis in (1, 0))
    assert abs(columns[0] - (63 - columns[-1])) <= 1
    assert len(rows) / len(columns) == pytest.approx(256 / 200, rel=0.05)


def test_only_the_pinned_file_is_kept(tmp_path, registry):
    cache = epath.Path(tmp_path) / "cache"
    package = publish(registry, "one", tarball({"a": b"a"}))
    path = packages.fetch(package, cache)
    path.write_bytes(b"cut off")
    assert packages.read_members(packages.fetch(package, cache), lambda name: True) == {"a": b"a"}
    for changes, message in (
        ({"sha512": "0" * 128}, r"SHA-512 differs.*npm_config_registry"),
        ({"sha512": "0" * 128, "size": 5}, r"longer than the pinned 5 bytes"),
        ({"version": "2.0.0"}, r"404.*npm pack one@2\.0\.0"),
    ):
        with pytest.raises(UserError, match=message):
            packages.fetch(replace(package, **changes), cache)
    assert packages.file_digest(path, "sha512") == package.sha512


def test_without_the_variable_the_registry_is_that_of_npms_settings(
    tmp_path, registry, monkeypatch
):
    cache = epath.Path(tmp_path) / "cache"
    package = publish(registry, "one", tarball({"a": b"a"}))
    address = f"http://127.0.0.1:{registry.server_port}/"
    monkeypatch.delenv(packages.REGISTRY_VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"npm.* can't be run: install it.*set npm_config_registry"):
        packages.fetch(package, cache)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n[ \"$*\" = 'config get registry' ] && echo {address}\n")
    npm.chmod(0o755)
    assert packages.fetch(package, cache).exists()


def test_members_are_regular_files_of_a_bounded_size(tmp_path):
    path = epath.Path(tmp_path) / "a.tgz"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        big = tarfile.TarInfo("big")
        big.size = 100
        archive.addfile(big, io.BytesIO(bytes(100)))
    path.write_bytes(content.getvalue())
    assert packages.read_members(path, lambda name: name == "link") == {}
    with pytest.raises(UserError, match=r"big of 100 bytes, more than 99"):
        packages.read_members(path, lambda name: True, max_size=99)
    path.write_bytes(content.getvalue()[:40])
    with pytest.raises(UserError, match=r"a\.tgz can't be read"):
        packages.read_members(path, lambda name: True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.npz", "--image_size", "4"], "--image_size is 4: give 8 to 256"),
        (["--out", "x"], "--out is x: give the path of an .npz file"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert cli.main(["prepare", "emoji", *arguments]) == 2
    assert message in capsys.readouterr().err
