"""The page: settings of a stage on the left, its samples on the right."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from etils import epath
from PIL import Image

from guided_distill.data.encoded import INPAINT
from guided_distill.data.images import upright
from guided_distill.data.pixels import fitted, from_uint8
from guided_distill.errors import UserError
from guided_distill.pictures import image_grid, point_plot
from guided_distill.runs.trained import Description
from guided_distill.sampling.request import usual_w
from guided_distill.serve.run import TEACHER, Drawn, OpenRun, PageRequest, calls_per_step

_KEEP_FILES = 3600
"""Seconds after which the files of pictures are deleted."""

_SEEDS = 2**32
_STEPS_BESIDE = 64
_MOST_STEPS = 1024
_LONGEST_PROMPT = 1000
"""In characters; text encoders read about 77 tokens."""

_SMALL_SIDE = 128
_PAINT = "#d33682"

_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "queue": False}


class Chosen(NamedTuple):
    """The values of the settings; an empty field is None."""

    stage: str
    w: float
    steps: int | None
    seed: int | None
    number: int


def build_page(workdir: epath.Path, *, stage: str | None = None) -> gr.Blocks:
    """Build a page that samples from the finished stages of a run and opens with `stage`.

    Raises UserError if no stage is finished, or if `stage` isn't.
    """
    run = OpenRun(workdir)
    if stage is not None and stage not in run.stages:
        raise UserError(
            f"--stage is {stage}, which isn't finished or can't sample: choose one of "
            f"{', '.join(run.stages)}"
        )
    first = stage or run.stages[-1]
    about = run.about(first)
    with gr.Blocks(
        title=f"{workdir.resolve().name} - guided_distill",
        analytics_enabled=False,
        delete_cache=(_KEEP_FILES, _KEEP_FILES),
    ) as page:
        gr.Markdown(f"# {workdir.resolve().name}\n{_subject(about)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                settings = _settings(run, first)
            with gr.Column(scale=3, min_width=300):
                if "text" not in about.condition_shapes:
                    _sample_tab(run, about, settings)
                else:
                    _text_tabs(run, about, settings)
    return page


def _text_tabs(run: OpenRun, about: Description, settings: list[Any]) -> None:
    with gr.Tabs():
        # An in-painting network can neither sample nor edit.
        if INPAINT not in about.condition_shapes:
            with gr.Tab("Sample"):
                _sample_tab(run, about, settings)
            with gr.Tab("Edit"):
                _edit_tab(run, about, settings)
        with gr.Tab("In-paint"):
            _inpaint_tab(run, about, settings)


def _subject(about: Description) -> str:
    on = "text" if "text" in about.condition_shapes else f"{len(about.class_names)} classes"
    return f"A run on `{about.experiment.data.title}`, conditioned on {on}."


def _settings(run: OpenRun, first: str) -> list[Any]:
    """The inputs that every tab uses: stage, w, steps, seed, number of samples."""
    about = run.about(first)
    stage = gr.Dropdown(run.stages, value=first, label="Stage", filterable=False)
    summary = gr.Markdown(_summary(about))
    w = gr.Slider(**_w_range(about), value=usual_w(about), step=0.1, label="Guidance weight w")
    steps = gr.Number(**_steps(about), minimum=1, precision=0, label="Steps")
    seed = gr.Number(0, minimum=0, maximum=_SEEDS - 1, precision=0, label="Seed")
    points = len(about.data_shape) == 1
    most, usual = (4096, 1024) if points else (64, 8)
    count = gr.Slider(
        1, most, value=usual, step=1, label="Number of points" if points else "Number of images"
    )

    def choose(stage: str, w: float) -> tuple[Any, ...]:
        about = run.about(stage)
        bounds = _w_range(about)
        held = float(np.clip(w, bounds["minimum"], bounds["maximum"]))
        return _summary(about), gr.Slider(**bounds, value=held), gr.Number(**_steps(about))

    stage.change(choose, [stage, w], [summary, w, steps], **_PRIVATE)
    return [stage, w, steps, seed, count]


def _summary(about: Description) -> str:
    what = {"teacher": "The teacher", "guidance": "Stage one"}.get(about.stage, "A student")
    if about.num_steps is not None:
        plural = "" if about.num_steps == 1 else "s"
        what += f" with {about.num_steps} step{plural} of the {about.sampler} sampler"
    calls = {1: "one network call", 2: "two network calls"}[calls_per_step(about)]
    if about.w_min is None:
        return f"{what}: {calls} per step, for any w."
    if about.w_min == about.w_max:
        return f"{what}: {calls} per step, for w = {about.w_min:g} only."
    return f"{what}: {calls} per step, for w from {about.w_min:g} to {about.w_max:g}."


def _w_range(about: Description) -> dict[str, Any]:
    """Bounds of the slider: the trained range, or up to twice its maximum if the network takes any w."""
    guidance = about.experiment.guidance
    if about.w_min is None or about.w_max is None:
        return {"minimum": 0.0, "maximum": 2.0 * max(guidance.w_max, 1.0), "interactive": True}
    wide = about.w_min < about.w_max
    return {"minimum": about.w_min, "maximum": about.w_max, "interactive": wide}


def _steps(about: Description) -> dict[str, Any]:
    free = about.num_steps is None
    value = about.num_steps or about.experiment.default_num_steps
    return {"value": value, "maximum": max(value, _MOST_STEPS), "visible": free}


def _sample_tab(run: OpenRun, about: Description, settings: list[Any]) -> None:
    points, texts = len(about.data_shape) == 1, "text" in about.condition_shapes
    if texts:
        of: Any = _prompt()
    else:
        of = gr.Dropdown(
            list(about.class_names),
            multiselect=True,
            label="Classes",
            info="Samples cycle through these classes; leave empty for all.",
        )
    with gr.Row(equal_height=True):
        beside = gr.Checkbox(
            label="Beside the teacher, with the same seeds", visible=run.has_teacher
        )
        teacher_steps = gr.Number(
            _STEPS_BESIDE,
            minimum=1,
            maximum=_MOST_STEPS,
            precision=0,
            label="The teacher's steps",
            visible=False,
        )
    with gr.Row():
        button = gr.Button("Sample", variant="primary", min_width=120)
        again = gr.Button("Next seed", min_width=120)
    with gr.Row():
        with gr.Column(min_width=280):
            left = _Canvas(points, label="Samples")
        with gr.Column(min_width=280, visible=False) as column:
            right = _Canvas(points, label="The teacher's samples")
    beside.change(
        lambda on: (gr.Number(visible=on), gr.Column(visible=on)),
        beside,
        [teacher_steps, column],
        **_PRIVATE,
    )

    def sample(
        of: Any, beside: bool, teacher_steps: int | None, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        with _errors_on_the_page():
            chosen = Chosen(*settings)
            what = _prompts(of, chosen) if texts else _labels(about, of, chosen)
            drawn = run.sample(chosen.stage, _request(run, chosen, **what))
            shown = (_words(drawn), _picture(drawn, about, **what))
            yield *shown, gr.skip(), gr.skip()
            if beside:
                teacher = chosen._replace(stage=TEACHER, steps=teacher_steps)
                drawn = run.sample(TEACHER, _request(run, teacher, **what))
                yield *shown, _words(drawn), _picture(drawn, about, **what)

    sampling: dict[str, Any] = {
        "fn": sample,
        "inputs": [of, beside, teacher_steps, *settings],
        "outputs": [*left.parts, *right.parts],
        **_ONE_AT_A_TIME,
    }
    gr.on([button.click, *([of.submit] if texts else [])], **sampling, api_name="sample")
    seed = settings[Chosen._fields.index("seed")]
    again.click(lambda seed: ((seed or 0) + 1) % _SEEDS, seed, seed, **_PRIVATE).then(
        **sampling, api_visibility="private"
    )


def _edit_tab(run: OpenRun, about: Description, settings: list[Any]) -> None:
    with gr.Row():
        image = gr.Image(
            type="pil",
            image_mode="RGBA",
            sources=["upload", "clipboard"],
            height=320,
            min_width=280,
            label="Image",
            elem_classes="given",
        )
        with gr.Column(min_width=280):
            prompt = _prompt()
            strength = gr.Slider(
                0.05,
                1.0,
                value=0.5,
                step=0.05,
                label="Strength",
                info="How much noise is added to the image, rounded down to whole steps.",
            )
            button = gr.Button("Edit", variant="primary")
    canvas = _Canvas(points=False, label="Edited images")

    def edit(
        image: Image.Image | None, prompt: str, strength: float, *settings: Any
    ) -> tuple[Any, ...]:
        with _errors_on_the_page():
            chosen = Chosen(*settings)
            request = _request(run, chosen, **_prompts(prompt, chosen))
            pixels = _pixels(image, run.image_shape(chosen.stage))
            drawn = run.edit(chosen.stage, request, pixels, strength=strength)
            return _words(drawn), _picture(drawn, about)

    button.click(
        edit,
        [image, prompt, strength, *settings],
        canvas.parts,
        api_name="edit",
        **_ONE_AT_A_TIME,
    )


def _inpaint_tab(run: OpenRun, about: Description, settings: list[Any]) -> None:
    side = about.experiment.data.image_size or _SMALL_SIDE
    with gr.Row():
        editor = gr.ImageEditor(
            type="pil",
            sources=["upload", "clipboard"],
            transforms=[],
            layers=False,
            # The default brush would cover a whole image of the samples' size.
            brush=gr.Brush(
                default_size=side // 8 if side < _SMALL_SIDE else "auto",
                colors=[_PAINT],
                color_mode="fixed",
            ),
            min_width=280,
            label="Image: paint over the part to replace",
        )
        with gr.Column(min_width=280):
            prompt = _prompt()
            mask = gr.Image(
                type="pil",
                image_mode="RGBA",
                sources=["upload"],
                height=160,
                label="Or a mask, white in the part to replace",
            )
            button = gr.Button("In-paint", variant="primary")
    canvas = _Canvas(points=False, label="In-painted images")

    def inpaint(
        drawing: dict[str, Any] | None, mask: Image.Image | None, prompt: str, *settings: Any
    ) -> tuple[Any, ...]:
        with _errors_on_the_page():
            chosen = Chosen(*settings)
            request = _request(run, chosen, **_prompts(prompt, chosen))
            shape = run.image_shape(chosen.stage)
            pixels = _pixels(drawing["background"] if drawing else None, shape)
            hole = _hole(mask or _painted_over(drawing), shape)
            drawn = run.inpaint(chosen.stage, request, pixels, hole)
            return _words(drawn), _picture(drawn, about)

    button.click(
        inpaint,
        [editor, mask, prompt, *settings],
        canvas.parts,
        api_name="inpaint",
        **_ONE_AT_A_TIME,
    )


def _prompt() -> gr.Textbox:
    return gr.Textbox(
        label="Prompt", placeholder="what the image should show", max_length=_LONGEST_PROMPT
    )


class _Canvas:
    """The place where samples appear, with a line of words above them."""

    def __init__(self, points: bool, *, label: str) -> None:
        words = gr.Markdown()
        if points:
            self.parts: list[Any] = [words, gr.Plot(label=label, show_label=False, visible=False)]
        else:
            gallery = gr.Gallery(
                label=label,
                show_label=False,
                columns=4,
                height="auto",
                format="png",
                buttons=["download", "fullscreen"],
                visible=False,
            )
            self.parts = [words, gallery]


@contextlib.contextmanager
def _errors_on_the_page() -> Iterator[None]:
    """Show a UserError on the page as its one sentence, without a traceback there or in the log."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _request(run: OpenRun, chosen: Chosen, **what: Any) -> PageRequest:
    if chosen.seed is None:
        raise UserError("there is no seed: give a whole number")
    if run.about(chosen.stage).num_steps is not None:
        return PageRequest(w=chosen.w, seed=chosen.seed, **what)
    if chosen.steps is None:
        raise UserError("there is no number of steps: give a whole number")
    return PageRequest(w=chosen.w, seed=chosen.seed, num_steps=chosen.steps, **what)


def _prompts(text: str, chosen: Chosen) -> dict[str, Any]:
    if not text.strip():
        raise UserError("there is no prompt: say what the image should show")
    if len(text) > _LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(text)} characters: give at most {_LONGEST_PROMPT}")
    return {"prompts": [text.strip()] * chosen.number}


def _labels(about: Description, names: list[str], chosen: Chosen) -> dict[str, Any]:
    classes = [about.class_names.index(name) for name in names] or range(len(about.class_names))
    return {"labels": np.resize(list(classes), chosen.number).tolist()}


def _pixels(image: Image.Image | None, shape: tuple[int, ...]) -> np.ndarray:
    if image is None:
        raise UserError("there is no image: upload one")
    return from_uint8(fitted(upright(image), shape))


def _hole(mask: Image.Image, shape: tuple[int, ...]) -> np.ndarray:
    """bool [H, W], True where the mask is white; transparent pixels count as black.

    Raises UserError if no pixel is white.
    """
    hole = fitted(upright(mask, over="black"), (*shape[:2], 1))[..., 0] > 127
    if not hole.any():
        raise UserError("nothing is painted over: paint on the image, or upload a mask")
    return hole


def _painted_over(drawing: dict[str, Any] | None) -> Image.Image:
    """A mask that is white where the brush painted."""
    strokes = [layer.getchannel("A") for layer in drawing["layers"]] if drawing else []
    if not strokes:
        return Image.new("L", (1, 1))
    return Image.fromarray(np.where(np.max(strokes, axis=0) > 0, 255, 0).astype(np.uint8))


def _words(drawn: Drawn) -> str:
    count = len(drawn.samples)
    of = "point" if drawn.samples.ndim == 2 else "image"
    return (
        f"**{drawn.stage}**: {_counted(drawn.num_steps, 'step')}, "
        f"{_counted(drawn.network_calls, 'network call')} for each {of}, "
        f"{_seconds(drawn.seconds)} for {_counted(count, of)}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _picture(drawn: Drawn, about: Description, **what: Any) -> Any:
    """A plot of points, or a gallery of images with their captions."""
    labels = what.get("labels")
    if drawn.samples.ndim == 2:
        return gr.Plot(point_plot(drawn.samples, np.asarray(labels)), visible=True)
    images: list[Any] = [image_grid(each[None], columns=1, scale=1) for each in drawn.samples]
    small = drawn.samples.shape[1] < _SMALL_SIDE
    if labels is not None:
        names = [about.class_names[label] for label in labels]
        images = list(zip(images, names, strict=True))
    classes = ["samples", "pixels"] if small else ["samples"]
    return gr.Gallery(images, elem_classes=classes, visible=True)
