// The canvas: an image, the outlines of its instances, and clicks and boxes as prompts.
// Gradio hands in element, trigger, props, upload and watch.

element.innerHTML = `
  <div class="drop" tabindex="0" role="button" aria-label="Choose an image">
    <strong>Drop an image here, paste it, or click to choose one</strong>
    <span>JPEG, PNG, WebP, TIFF; up to ${props.megabytes} MB and ${props.megapixels} million pixels</span>
    <div class="examples"><span>or take an example</span></div>
  </div>
  <div class="stage" hidden>
    <div class="tools" role="toolbar" aria-label="Tools">
      <button data-tool="click" title="Click on an object to name it or to select it">Click</button>
      <button data-tool="add" title="A click adds to the selected object, wherever it is">Add to object</button>
      <button data-tool="remove" title="A click marks what is not part of the selected object (right click, or Shift)">Background click</button>
      <button data-tool="box" title="Drag a box around an object (with a mouse, with any tool)">Box</button>
      <span class="gap"></span>
      <button data-do="done" title="Deselect the object (Esc)">Deselect</button>
      <button data-do="undo" title="Take the last step back (Ctrl+Z)">Undo</button>
      <button data-do="labels" title="Show names on the image" aria-pressed="true">Names</button>
      <button data-do="other" title="Choose another image">New image</button>
    </div>
    <div class="view"><img alt="Your image" draggable="false"><svg tabindex="0" aria-label="Objects"></svg><div class="tags"></div>
      <div class="zoom">
        <button data-do="in" title="Zoom in (Ctrl and the wheel)" aria-label="Zoom in">+</button>
        <button data-do="out" title="Zoom out" aria-label="Zoom out">−</button>
        <button data-tool="move" title="Drag to move the enlarged image (middle button, with any tool)" aria-label="Move the image">✥</button>
      </div>
    </div>
    <p class="hint"></p>
  </div>
  <input type="file" accept="image/*,.tif,.tiff" hidden>`;

const find = (selector) => element.querySelector(selector);
const [drop, stage, view, image, svg, tags, input] = [".drop", ".stage", ".view", ".view img", "svg", ".tags", "input"].map(find);
const MOST_ZOOM = 16;
let tool = "click", state = { shapes: [], prompts: { points: [] } }, start = null;
let zoom = { scale: 1, x: 0, y: 0 };  // x and y: the upper left corner that is shown, in shares of the image

// --- choosing an image ---

props.examples.forEach((source, number) => {
  const button = document.createElement("button");
  button.innerHTML = `<img src="${source}" alt="Example ${number + 1}">`;
  button.onclick = (event) => { event.stopPropagation(); trigger("example", { number }); };
  find(".examples").append(button);
});

const { take, choose } = acceptFiles("picture", "make it smaller, for example as JPEG");
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file && element.offsetParent) take(file);
});

// --- asking by clicks and boxes ---

function at(event) {  // in pixels of the image
  const frame = svg.getBoundingClientRect(), [width, height] = state.size;
  const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
  const across = zoom.x + (event.clientX - frame.left) / frame.width / zoom.scale;
  const down = zoom.y + (event.clientY - frame.top) / frame.height / zoom.scale;
  return [clamp(across * width, width), clamp(down * height, height)];
}

const moves = () => tool === "move" || start?.moves;
svg.onpointerdown = (event) => {
  if (event.button === 1) event.preventDefault();
  start = { x: event.clientX, y: event.clientY, from: at(event), touch: event.pointerType === "touch", zoom, moves: event.button === 1 };
  if (tool === "box" || tool === "move" || !start.touch) svg.setPointerCapture(event.pointerId);
};
svg.onpointermove = (event) => {
  if (!start || (start.touch && tool !== "box" && tool !== "move")) return;
  if (moves()) {
    const frame = svg.getBoundingClientRect();
    return zoomTo(zoom.scale, start.zoom.x - (event.clientX - start.x) / frame.width / zoom.scale, start.zoom.y - (event.clientY - start.y) / frame.height / zoom.scale);
  }
  const [x1, y1] = start.from, [x2, y2] = at(event);
  const far = Math.hypot(event.clientX - start.x, event.clientY - start.y) > 6;
  start.box = far ? [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2) + 1, Math.max(y1, y2) + 1] : null;
  draw();
};
svg.onpointerup = (event) => {
  if (!start) return;
  const { box, from } = start, moved = Math.hypot(event.clientX - start.x, event.clientY - start.y) > 6, panned = moves();
  start = null;
  draw();
  if (panned) return;
  if (box) return trigger("point", { box });
  if (moved || tool === "box") return;
  const background = tool === "remove" || event.button === 2 || event.shiftKey;
  trigger("point", { point: [...from, background ? 0 : 1], add: tool === "add" });
};
svg.onpointercancel = () => { start = null; draw(); };
svg.oncontextmenu = (event) => event.preventDefault();

// --- zoom ---

function zoomTo(scale, x, y) {
  scale = Math.min(Math.max(scale, 1), MOST_ZOOM);
  const inside = (value) => Math.min(Math.max(value, 0), 1 - 1 / scale);
  zoom = { scale, x: inside(x), y: inside(y) };
  draw();
}
function zoomBy(factor, across = 0.5, down = 0.5) {  // the place at these shares of the view stays where it is
  const scale = Math.min(Math.max(zoom.scale * factor, 1), MOST_ZOOM);
  zoomTo(scale, zoom.x + across / zoom.scale - across / scale, zoom.y + down / zoom.scale - down / scale);
}
svg.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;  // the page scrolls
  event.preventDefault();
  const frame = svg.getBoundingClientRect();
  zoomBy(Math.exp(-event.deltaY / 200), (event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height);
}, { passive: false });

function act(what, more = {}) { trigger("act", { act: what, ...more }); }
const actions = {
  undo: () => act("undo"),
  in: () => zoomBy(1.5),
  out: () => zoomBy(1 / 1.5),
  done: () => act("activate", { key: "" }),
  other: choose,
  labels: (button) => {
    const on = tags.classList.toggle("off");
    button.setAttribute("aria-pressed", String(!on));
  },
};
stage.onclick = (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.tool) { tool = button.dataset.tool; draw(); }
  if (button?.dataset.do) actions[button.dataset.do](button);
};
document.addEventListener("keydown", (event) => {
  if (!element.offsetParent || event.target.closest("input, textarea")) return;
  if (event.key === "Escape") actions.done();
  if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); actions.undo(); }
});

// --- drawing ---

function shape(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const HINTS = {
  click: "Click on an object to name it; click near it to refine it, elsewhere for another one. Drag to draw a box.",
  add: "Click on what also belongs to the selected object.",
  remove: "Click on what is not part of the selected object.",
  box: "Drag a box around an object.",
  move: "Drag to move the enlarged image.",
};

function draw() {
  const [width, height] = state.size ?? [1, 1];
  const shownWidth = width / zoom.scale, left = zoom.x * width, top = zoom.y * height;
  const pixel = shownWidth / (svg.clientWidth || width);  // one pixel of the screen
  view.style.setProperty("--ratio", width / height);
  image.style.transform = `scale(${zoom.scale}) translate(${-zoom.x * 100}%, ${-zoom.y * 100}%)`;
  svg.setAttribute("viewBox", `${left} ${top} ${shownWidth} ${height / zoom.scale}`);
  svg.dataset.tool = tool;
  svg.replaceChildren();
  tags.replaceChildren();
  const shown = state.shapes.filter((one) => !one.hidden).sort((a, b) => b.area - a.area);  // small ones on top
  for (const one of shown) {
    const outline = shape("path", { d: one.path, fill: one.colour, stroke: one.colour, class: classes(one), "data-key": one.key });
    outline.append(shape("title", {}));
    outline.firstChild.textContent = one.label;
    svg.append(outline);
  }
  placeTags(shown, (x) => (x - left) / pixel, (y) => (y - top) / pixel);
  const box = start?.box ?? state.prompts.box;
  if (box) svg.append(shape("rect", { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1], class: "prompt" }));
  for (const [x, y, label] of state.prompts.points ?? [])
    svg.append(shape("circle", { cx: x, cy: y, r: 6 * pixel, class: label ? "on" : "beside" }));
  for (const button of stage.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  find("[data-do=undo]").disabled = !state.undo;
  find("[data-do=out]").disabled = zoom.scale === 1;
  for (const button of stage.querySelectorAll("[data-do=done], [data-tool=add], [data-tool=remove]")) button.disabled = !state.active;
  const names = (state.names ?? []).map(([name, score]) => `${name} ${score.toFixed(2)}`).join(" · ");
  find(".hint").textContent = names || HINTS[tool];
}

const classes = (one) => "object" + (one.key === state.active ? " active" : "");

// Each name at the upper left corner of its box, or else inside or below, where it covers no other; one without room is
// shown when the pointer is over its object in the list.
function placeTags(shown, toX, toY) {
  const taken = [], room = { width: svg.clientWidth, height: svg.clientHeight };
  const order = [...shown].sort((a, b) => (b.key === state.active) - (a.key === state.active) || b.score - a.score);
  for (const one of order) {
    const tag = document.createElement("span");
    tag.textContent = one.key === state.active ? `${one.label} ${one.score.toFixed(2)}` : one.label;
    tag.dataset.key = one.key;
    tag.className = classes(one);
    tag.style.setProperty("--colour", one.colour);
    tags.append(tag);
    const { offsetWidth: w, offsetHeight: h } = tag, [x1, y1, x2, y2] = one.box;
    const within = (x, y) => [Math.min(Math.max(x, 0), room.width - w), Math.min(Math.max(y, 0), room.height - h)];
    const places = [
      [toX(x1), toY(y1) - h], [toX(x1), toY(y1)], [toX(x2) - w, toY(y1)], [toX((x1 + x2) / 2) - w / 2, toY((y1 + y2) / 2) - h / 2],
      [toX(x1), toY(y2) - h], [toX(x1), toY(y2)],
    ].map(([x, y]) => within(x, y));
    const free = places.find(([x, y]) => !taken.some((other) => x < other.x + other.w && x + w > other.x && y < other.y + other.h && y + h > other.y));
    const outside = toX(x2) < 0 || toY(y2) < 0 || toX(x1) > room.width || toY(y1) > room.height;
    const [x, y] = free ?? places[0];
    tag.style.transform = `translate(${x}px, ${y}px)`;
    tag.classList.toggle("crowded", outside || !free);
    if (free && !outside) taken.push({ x, y, w, h });
  }
}

watch("value", () => {
  if (props.value.picture) {
    image.src = props.value.picture;
    zoom = { scale: 1, x: 0, y: 0 };
    tool = "click";
  }
  state = props.value;
  if (state.token) sessionStorage.setItem("ovsam-session", state.token);
  if (!state.active && (tool === "add" || tool === "remove")) tool = "click";
  drop.hidden = !!state.size;
  stage.hidden = !state.size;
  draw();
});
new ResizeObserver(draw).observe(image);
document.addEventListener("ovsam-hover", ({ detail }) => {
  for (const node of element.querySelectorAll(".object")) node.classList.toggle("hover", node.dataset.key === detail);
});
const token = sessionStorage.getItem("ovsam-session");
if (token) trigger("restore", { token });  // the page was reloaded
