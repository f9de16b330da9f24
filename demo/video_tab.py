"""The Video tab: choose a clip, type words or click on objects of any frame, follow them, look through it, download."""

import asyncio
import secrets
import shutil
from pathlib import Path

import engine
import gradio as gr
from api import word_list
from clip import MAX_FRAMES, MAX_MEGABYTES, MAX_SIDE, MAX_WORDS, Clip, VideoScene
from gradio.utils import get_upload_folder
from image_tab import sessions
from page import LONGEST_TEXT, SAVE, Page, busy, message, script

import ovsam


def scene_of(request: gr.Request) -> VideoScene:
    scene = sessions.get(request.session_hash, new=True).video
    if scene is None:
        raise ovsam.InputError("There is no clip yet; choose one.")
    return scene


async def receive_clip(request: gr.Request, event: gr.EventData, *, show):
    """A new clip: decode it, and show its first frame."""
    session = sessions.get(request.session_hash, new=True)
    given = event._data.get("path")
    path = Path(given).resolve() if isinstance(given, str) and "\0" not in given else Path("/")
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise ovsam.InputError("The clip must be uploaded.")
    folder = session.folder / f"clip-{secrets.token_hex(8)}"
    clip = await asyncio.to_thread(Clip.read, path, path.name, folder, show)
    if session.video is not None:
        shutil.rmtree(session.video.clip.folder, ignore_errors=True)
    session.video = VideoScene(clip)
    shown = {"files": str(clip.folder), "length": len(clip), "size": list(clip.size), "rate": float(clip.rate)}
    return {"player": session.video.view() | {"clip": shown}, "message": clip.note}


async def point_at(request: gr.Request, event: gr.EventData, model: str, *, show):
    """A click or a box on a frame: segment and name the object there at once; it is followed when Track is pressed."""
    session, scene, given = sessions.get(request.session_hash), scene_of(request), event._data
    frame = min(max(int(given["frame"]), 0), len(scene.clip) - 1)
    if given.get("box"):
        number = scene.box(frame, tuple(given["box"]))
    else:
        number, is_new = scene.point(frame, *given["point"])
        if not is_new:
            return {"player": scene.view()}
    picture = engine.Upload(scene.clip.frame(frame), scene.clip.name, f"{scene.clip.folder.name} {frame}")
    asked = scene.pointed[number][frame].arguments()
    found = await engine.ask(model, session.token, picture, "what", show, **asked)
    if not found[0].area:
        if number not in scene.shown.get(frame, {}):
            scene.remove(number)
        raise ovsam.InputError("No object was found there; click on the middle of one, or draw a box around it.")
    scene.keep(frame, number, found[0])
    return {"player": scene.view()}


def change(request: gr.Request, event: gr.EventData):
    """Select an object (0 for none), or remove one."""
    scene, number = scene_of(request), int(event._data["id"])
    if event._data["act"] == "remove":
        scene.remove(number)
    else:
        scene.active = number
    return {"player": scene.view()}


async def track(request: gr.Request, words: str, model: str):
    """Follow all objects through the clip, frame by frame; other visitors' questions go on in between."""
    session, scene = sessions.get(request.session_hash, new=True), scene_of(request)
    wanted, prompts = word_list(words), scene.prompts()
    if len(wanted) > MAX_WORDS:
        raise ovsam.InputError(f"There are {len(wanted)} words; {MAX_WORDS} are the most for a video.")
    if not wanted and not prompts:
        raise ovsam.InputError("There is nothing to follow yet; type words, or click on an object.")
    segmenter = await asyncio.to_thread(engine.models.get, model)
    stream = ovsam.VideoSegmenter(segmenter).track(scene.clip.folder, wanted or None, prompts)
    frames = scene.results(stream, session.folder / "video" / f"{Path(scene.clip.name).stem}.tracked.mp4")
    try:
        yield {"message": busy(f"Frame 1 of {len(scene.clip)}", 0.0)}
        while (frame := await engine.turns.take(lambda: next(frames, None))) is not None:
            done = frame.index + 1
            count = len(frame.results)
            text = f"Frame {done} of {len(scene.clip)}, {count} object{'s' * (count != 1)}"
            part = {"frames": scene.frame_view(frame.index), "at": frame.index}
            yield {"player": part, "message": busy(text, done / len(scene.clip))}
    finally:  # also where it was cancelled: what is there can be downloaded
        await asyncio.to_thread(close, frames, stream)
    count = len(scene.tracks.tracks)
    ended = f"{count} {'object was' if count == 1 else 'objects were'} followed." if count else "No object was found."
    yield {"player": scene.view() | {"at": 0}, "message": ended}


def close(*streams) -> None:
    """Close generators, once the frame that may be in work is done."""
    with engine.turns.free:
        for stream in streams:
            stream.close()


def stop(request: gr.Request):
    session = sessions.get(request.session_hash, new=True)
    return {"message": "Cancelled."} | ({"player": session.video.view()} if session.video else {})


def save_video(request: gr.Request):
    scene = scene_of(request)
    if scene.video is None or not scene.tracks.length:
        raise ovsam.InputError("There is nothing to download yet; press Track first.")
    return {"file": str(scene.video)}


def save_json(request: gr.Request):
    scene = scene_of(request)
    if not scene.tracks.length:
        raise ovsam.InputError("There is nothing to download yet; press Track first.")
    target = sessions.get(request.session_hash).folder / "video" / f"{Path(scene.clip.name).stem}.tracks.json"
    return {"file": str(scene.save_json(target))}


def video_tab(model: str) -> None:
    page = Page(message=message())
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            page["player"] = player = gr.HTML(
                {}, html_template="", js_on_load=script("upload.js", "player.js"), elem_id="player",
                apply_default_css=False,
                megabytes=MAX_MEGABYTES, frames=MAX_FRAMES, side=MAX_SIDE,
            )  # fmt: skip
        with gr.Column(scale=2, min_width=320):
            with gr.Group():
                with gr.Row(equal_height=True):
                    words = gr.Textbox(
                        label="Follow these words", placeholder="person, dog", max_length=LONGEST_TEXT, scale=4
                    )
                    start = gr.Button("Track", variant="primary", scale=1, min_width=80)
            gr.Markdown(
                "Words are searched on the first frame and every 10 frames. A clicked object is followed from "
                "the frame of its first click on. Clicks on other frames correct it when the clip is tracked again."
            )
            with gr.Row():
                video = gr.Button("Download video")
                tracks = gr.Button("Download json")
            page["file"] = file = gr.File(visible="hidden")
    chosen = gr.State(model)
    outputs = list(page.values())
    quick = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
    running = [
        player.clip(page.does(receive_clip), None, outputs, **quick),
        player.point(page.does(point_at), chosen, outputs, **quick),
        gr.on([start.click, words.submit], page.does(track), [words, chosen], outputs, **quick),
    ]
    page["message"].cancel(page.does(stop), None, outputs, cancels=running, **quick)
    player.act(page.does(change), None, outputs, **quick)
    for button, handler in ((video, save_video), (tracks, save_json)):
        button.click(page.does(handler), None, outputs, **quick).success(None, file, None, js=SAVE, **quick)
