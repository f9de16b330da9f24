// The player of the tab Video: a clip frame by frame, the outlines of its objects, and clicks and boxes that choose them.

element.innerHTML = `
  <div class="drop" tabindex="0" role="button" aria-label="Choose a clip">
    <strong>Drop a clip here, or click to choose one</strong>
    <span>MP4, MOV, WebM, GIF; up to ${props.megabytes} MB and ${props.frames} frames (${Math.floor(props.frames / 30)} s at 30 a second).
    Frames are scaled to ${props.side} pixels.</span>
  </div>
  <div class="stage" hidden>
    <div class="tools" role="toolbar" aria-label="Tools">
      <button data-tool="click" title="Click on an object to choose it">Click</button>
      <button data-tool="remove" title="A click marks what is not part of the selected object (right click, or Shift)">Background click</button>
      <button data-tool="box" title="Drag a box around an object (with a mouse, with any tool)">Box</button>
      <span class="gap"></span>
      <button data-do="done" title="Deselect the object: the next click chooses another one (Esc)">Deselect</button>
      <button data-do="other" title="Choose another clip">New clip</button>
    </div>
    <div class="view"><img alt="The frame" draggable="false"><svg aria-label="Objects"></svg></div>
    <div class="time">
      <button data-do="play" aria-label="Play">▶</button>
      <input type="range" min="0" value="0" aria-label="Frame">
      <output></output>
    </div>
    <ul class="objects"></ul>
  </div>
  <input type="file" accept="video/*,.gif,.mkv" hidden>`;

const find = (selector) => element.querySelector(selector);
const [drop, stage, view, image, svg, input, range, counter, list] =
  [".drop", ".stage", ".view", "img", "svg", "input[type=file]", "input[type=range]", "output", ".objects"].map(find);
let clip = null, frames = {}, state = { objects: [], active: 0, points: {} }, tool = "click", start = null, playing = null;
const now = () => Number(range.value);
const file = (number) => `${location.origin}${location.pathname.replace(/\/$/, "")}/gradio_api/file=${clip.files}/${String(number).padStart(5, "0")}.jpg`;

const { choose } = acceptFiles("clip", "cut it or save it smaller");

// --- clicks and boxes ---

function at(event) {  // in pixels of the frame
  const box = svg.getBoundingClientRect(), [width, height] = clip.size;
  const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
  return [clamp((event.clientX - box.left) / box.width * width, width), clamp((event.clientY - box.top) / box.height * height, height)];
}
const isFar = (event) => Math.hypot(event.clientX - start.x, event.clientY - start.y) > 6;
svg.onpointerdown = (event) => {
  if (event.button === 1) return;
  stop();
  start = { x: event.clientX, y: event.clientY, from: at(event), touch: event.pointerType === "touch" };
  if (tool === "box" || !start.touch) svg.setPointerCapture(event.pointerId);
};
svg.onpointermove = (event) => {
  if (!start || (start.touch && tool !== "box")) return;
  const [x1, y1] = start.from, [x2, y2] = at(event);
  start.box = isFar(event) ? [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2) + 1, Math.max(y1, y2) + 1] : null;
  draw();
};
svg.onpointerup = (event) => {
  if (!start) return;
  const { box, from } = start, moved = isFar(event);
  start = null;
  draw();
  if (box) return trigger("point", { frame: now(), box });
  if (moved || tool === "box") return;
  const background = tool === "remove" || event.button === 2 || event.shiftKey;
  trigger("point", { frame: now(), point: [...from, background ? 0 : 1] });
};
svg.onpointercancel = () => { start = null; draw(); };
svg.oncontextmenu = (event) => event.preventDefault();

// --- looking through it ---

function stop() {
  clearInterval(playing);
  playing = null;
  find("[data-do=play]").textContent = "▶";
}
function play() {
  if (playing) return stop();
  find("[data-do=play]").textContent = "❚❚";
  playing = setInterval(() => { range.value = (now() + 1) % clip.length; draw(); }, 1000 / Math.min(clip.rate, 30));
}
range.oninput = () => { stop(); draw(); };
const act = (what, id) => trigger("act", { act: what, id });
const actions = { play, done: () => act("activate", 0), other: choose };
stage.onclick = (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.tool) { tool = button.dataset.tool; draw(); }
  if (button?.dataset.do) actions[button.dataset.do]();
};
document.addEventListener("keydown", (event) => {
  if (element.offsetParent && clip && event.key === "Escape" && !event.target.closest("input[type=text], textarea")) actions.done();
});

// --- drawing ---

function shape(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function draw() {
  if (!clip) return;
  const [width, height] = clip.size, pixel = width / (svg.clientWidth || width);
  view.style.setProperty("--ratio", width / height);
  if (image.dataset.frame !== `${clip.files} ${now()}`) {
    image.src = file(now());
    image.dataset.frame = `${clip.files} ${now()}`;
  }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.dataset.tool = tool;
  svg.replaceChildren();
  for (const one of frames[now()] ?? []) {
    svg.append(shape("path", { d: one.path, fill: one.colour, stroke: one.colour, class: "object" + (one.id === state.active ? " active" : ""), "data-id": one.id }));
    svg.append(shape("text", { x: one.box[0] + 3 * pixel, y: Math.max(one.box[1] - 4 * pixel, 13 * pixel), "font-size": 13 * pixel, "stroke-width": 3 * pixel }, `${one.label} ${one.id}`));
  }
  const box = start?.box;
  if (box) svg.append(shape("rect", { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1], class: "prompt" }));
  for (const [x, y, label] of state.points[now()] ?? [])
    svg.append(shape("circle", { cx: x, cy: y, r: 6 * pixel, class: label ? "on" : "beside" }));
  for (const button of stage.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  for (const button of stage.querySelectorAll("[data-do=done], [data-tool=remove]")) button.disabled = !state.active;
  counter.textContent = `${now() + 1} / ${clip.length}`;
}

function drawList() {
  list.replaceChildren(...state.objects.map((one) => {
    const row = document.createElement("li"), name = document.createElement("button"), gone = document.createElement("button");
    row.className = one.id === state.active ? "active" : "";
    name.className = "name";
    const dot = document.createElement("i");
    dot.className = "dot";
    dot.style.background = one.colour;
    name.append(dot, `${one.label} ${one.id} · ${one.frames} frame${one.frames === 1 ? "" : "s"}`);
    name.onclick = () => act("activate", one.id === state.active ? 0 : one.id);
    gone.textContent = "Remove";
    gone.onclick = () => act("remove", one.id);
    row.append(name, gone);
    return row;
  }));
}

watch("value", () => {
  const value = props.value;
  if (value.clip) {
    clip = value.clip;
    stop();
    range.max = clip.length - 1;
    range.value = 0;
    tool = "click";
  }
  if (value.whole) {
    frames = value.frames;
    state = value;
    if (!state.active && tool === "remove") tool = "click";
    drawList();
  } else if (value.frames) Object.assign(frames, value.frames);
  if (value.at !== undefined && clip) range.value = value.at;
  drop.hidden = !!clip;
  stage.hidden = !clip;
  draw();
});
new ResizeObserver(draw).observe(image);
