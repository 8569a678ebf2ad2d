"""The page of `guided-distill serve`: the samples of `load`, errors in one sentence, no downloads."""

import importlib.util
import socket

import httpx
import numpy as np
import pytest
from browser import opened_page, serious_findings
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import guided_distill
from guided_distill import cli
from guided_distill.data.pixels import to_uint8
from guided_distill.serve import page as page_of_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_arguments):
    path = tmp_path_factory.mktemp("run")
    fewer = "--config.halving.first_num_steps=1"
    assert cli.main(["train", "--workdir", str(path), *tiny_arguments, fewer]) == 0
    return path


def pixels(gallery):
    images = [np.asarray(Image.open(each["image"])) for each in gallery["value"]]
    return np.stack(images).astype(int)


def test_a_mask_of_strokes_on_transparency_is_its_strokes():
    strokes = np.full((8, 8, 4), 255, np.uint8)
    strokes[..., 3] = 0
    strokes[2:4, 5:, 3] = 255
    hole = page_of_run._hole(Image.fromarray(strokes), (8, 8, 3))
    np.testing.assert_array_equal(hole, strokes[..., 3] == 255)


def test_the_page_draws_what_the_stages_draw(workdir, served):
    client = Client(served(workdir), verbose=False)
    asked = {"labels": [3, 7, 3], "w": 1.5, "seed": 4}
    # Classes, whether to show the teacher and its 2 steps; then stage, w, steps, seed and number.
    chosen = (["3", "7"], True, 2, "halving_ddim_1", 1.5, None, 4, 3)
    words, drawn, teachers_words, beside = client.predict(*chosen, api_name="/sample")
    for found, stage, how in ((drawn, "halving_ddim_1", {}), (beside, "teacher", {"num_steps": 2})):
        model = guided_distill.load(workdir / stage)
        expected = to_uint8(model.sample(**asked, **how))[..., 0].astype(int)
        assert np.abs(pixels(found) - expected).max() <= 1
        assert [each["caption"] for each in found["value"]] == ["3", "7", "3"]
    assert "1 step, 1 network call for each image" in words
    assert "2 steps, 4 network calls for each image" in teachers_words


def test_a_page_of_labels_refuses_bad_settings(workdir, served):
    client = Client(served(workdir), verbose=False)
    assert [each["api_name"] for each in client.config["dependencies"] if each["queue"]] == [
        "sample",
        "sample_1",
    ]
    kinds = {each["type"] for each in client.config["components"]}
    assert not {"tabs", "image", "imageeditor"} & kinds
    for change, said in (
        ({"w": 9.0}, "greater than maximum value 4"),
        ({"stage": "teacher", "steps": None}, "there is no number of steps"),
        ({"seed": None}, "there is no seed"),
        ({"stage": "teacher", "steps": 10**9}, "greater than maximum value 1024"),
        ({"number": 10**6}, "greater than maximum value 64"),
        ({"stage": "halving_ddim_3"}, "halving_ddim_3"),
    ):
        asked = {"stage": "halving_ddim_1", "w": 1.0, "steps": 1, "seed": 0, "number": 2} | change
        with pytest.raises(AppError, match=said):
            client.predict([], False, 2, *asked.values(), api_name="/sample")
    with pytest.raises(AppError, match="greater than maximum value 1024"):
        client.predict([], True, 2**31, "teacher", 1.0, 1, 0, 2, api_name="/sample")


def serve(workdir, *more):
    return cli.main(["serve", "--workdir", str(workdir), *more])


def test_bad_input_is_one_sentence(workdir, tmp_path, capsys, monkeypatch):
    logins = {}
    for name, text in (("good", "ann:secret"), ("empty", ""), ("bad", "ann:secret\nbob\n")):
        logins[name] = str(tmp_path / name)
        (tmp_path / name).write_text(text)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, said in (
            ((workdir, "--port", port), f"--port {port}"),
            ((workdir, "--host", "192.0.2.1", "--auth", logins["good"]), "--host 192.0.2.1 --port"),
            ((workdir, "--host", "192.0.2.1"), "add --auth FILE"),
            ((workdir, "--host", "0.0.0.0"), "add --auth FILE"),
            ((workdir, "--host", "::"), "add --auth FILE"),
            ((workdir, "--auth", logins["empty"]), f"--auth {logins['empty']} is empty"),
            ((workdir, "--auth", logins["bad"]), f"line 2 of --auth {logins['bad']}"),
            ((workdir, "--auth", str(tmp_path)), f"--auth {tmp_path} can't be read"),
            ((workdir, "--stage", "halving_ddim_3"), "choose one of teacher, guid"),
            ((tmp_path,), "holds no run"),
        ):
            assert serve(*arguments) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert said in line
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert serve(workdir) == 2
    assert "pip install gradio (the extra `serve`)" in capsys.readouterr().err


@pytest.mark.browser
def test_a_browser_shows_images_that_arrive(workdir, served):
    url = served(workdir)
    for scheme in ("light", "dark"):
        with opened_page(color_scheme=scheme, viewport={"width": 390, "height": 844}) as page:
            asked = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(url)
            page.get_by_label("Beside the teacher").check()
            page.get_by_role("button", name="Sample", exact=True).click()
            page.get_by_text("teacher: ").wait_for()
            images = page.locator(".samples img")
            images.nth(15).wait_for()
            assert images.count() == 16
            assert images.first.evaluate("image => image.naturalWidth") == 8
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            assert serious_findings(page) == []
            page.get_by_label("Seed", exact=True).fill("")
            page.get_by_role("button", name="Sample", exact=True).click()
            page.get_by_text("there is no seed").wait_for()
            assert {each for each in asked if not each.startswith((url, "data:", "blob:"))} == set()


def test_points_are_plotted_for_a_user_who_logs_in(tmp_path, served):
    arguments = ["--config", "configs/mixture2d.py:runlocal", "--config.stage=teacher"]
    assert cli.main(["train", "--workdir", str(tmp_path), *arguments]) == 0
    (tmp_path / "logins").write_text("ann:secret\n")
    url = served(tmp_path, "--auth", str(tmp_path / "logins"))
    assert httpx.get(f"{url}config").status_code == 401
    with httpx.Client(base_url=url) as session:
        logins = ({"username": "ann", "password": word} for word in ("secrets", "secret"))
        assert [session.post("login", data=login).status_code for login in logins] == [400, 200]
        assert session.get("config").status_code == 200
        sizes = (10**6, 21 * 10**6)
        uploads = [
            session.post("gradio_api/upload", files={"files": bytes(size)}) for size in sizes
        ]
        assert [upload.status_code for upload in uploads] == [200, 413]
    client = Client(url, verbose=False, auth=("ann", "secret"))
    _, drawn, *_ = client.predict([], False, 2, "teacher", 1.0, 2, 0, 9, api_name="/sample")
    assert drawn["value"]["type"] == "matplotlib"
