// One canvas: a picture, the outlines of what was found in it, and clicks and boxes that ask about it.
// Gradio hands in element, trigger, props, upload and watch.

element.innerHTML = `
  <div class="drop" tabindex="0" role="button" aria-label="Choose a picture">
    <strong>Drop a picture here, paste it, or click to choose one</strong>
    <span>JPEG, PNG, WebP, TIFF, up to ${props.megabytes} MB</span>
    <div class="examples"><span>or take an example</span></div>
  </div>
  <div class="stage" hidden>
    <div class="tools" role="toolbar" aria-label="Tools">
      <button data-tool="add" title="Click on a thing (left click)">+ on it</button>
      <button data-tool="remove" title="Click beside the thing (right click, or Shift)">− beside it</button>
      <button data-tool="box" title="Drag a box around a thing (with a mouse, with any tool)">box</button>
      <span class="gap"></span>
      <button data-do="done" title="Done with this object: the next click begins another (Esc)">done</button>
      <button data-do="undo" title="Take the last step back (Ctrl+Z)">undo</button>
      <button data-do="labels" title="Show names" aria-pressed="true">names</button>
      <button data-do="other" title="Choose another picture">new picture</button>
    </div>
    <div class="view"><img alt="Your picture" draggable="false"><svg tabindex="0" aria-label="Objects"></svg><div class="tags"></div></div>
    <p class="hint"></p>
  </div>
  <input type="file" accept="image/*,.tif,.tiff" hidden>
  <p class="problem" role="alert" hidden></p>`;

const find = (selector) => element.querySelector(selector);
const [drop, stage, image, svg, tags, input, problem] =
  [".drop", ".stage", "img", "svg", ".tags", "input", ".problem"].map(find);
let tool = "add", state = { shapes: [], prompts: { points: [] } }, start = null;

// --- choosing a picture ---

props.examples.forEach((source, number) => {
  const button = document.createElement("button");
  button.innerHTML = `<img src="${source}" alt="Example ${number + 1}">`;
  button.onclick = (event) => { event.stopPropagation(); trigger("example", { number }); };
  find(".examples").append(button);
});

function complain(message) {
  problem.textContent = message;
  problem.hidden = !message;
}

async function take(file) {
  if (!file) return;
  complain("");
  if (file.size > props.megabytes * 1e6) return complain(`${file.name} has more than ${props.megabytes} MB; save it smaller, as JPEG for one.`);
  drop.classList.add("busy");
  try {
    const { path } = await upload(file);
    trigger("picture", { path });
  } catch (error) {
    complain(`${file.name} could not be uploaded: ${error.message}`);
  }
  drop.classList.remove("busy");
}

const choose = () => { input.value = ""; input.click(); };
drop.onclick = choose;
drop.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") choose(); };
input.onchange = () => take(input.files[0]);
element.ondragover = (event) => { event.preventDefault(); element.classList.add("over"); };
element.ondragleave = () => element.classList.remove("over");
element.ondrop = (event) => {
  event.preventDefault();
  element.classList.remove("over");
  take(event.dataTransfer.files[0]);
};
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file && element.isConnected) take(file);
});

// --- asking by clicks and boxes ---

function at(event) {  // in pixels of the picture
  const frame = svg.getBoundingClientRect(), [width, height] = state.size;
  const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
  return [clamp((event.clientX - frame.left) / frame.width * width, width), clamp((event.clientY - frame.top) / frame.height * height, height)];
}

svg.onpointerdown = (event) => {
  if (event.button === 1) return;
  start = { x: event.clientX, y: event.clientY, from: at(event), touch: event.pointerType === "touch" };
  if (tool === "box" || !start.touch) svg.setPointerCapture(event.pointerId);
};
svg.onpointermove = (event) => {
  if (!start || (start.touch && tool !== "box")) return;
  const [x1, y1] = start.from, [x2, y2] = at(event);
  const far = Math.hypot(event.clientX - start.x, event.clientY - start.y) > 6;
  start.box = far ? [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2) + 1, Math.max(y1, y2) + 1] : null;
  draw();
};
svg.onpointerup = (event) => {
  if (!start) return;
  const { box, from } = start, moved = Math.hypot(event.clientX - start.x, event.clientY - start.y) > 6;
  start = null;
  draw();
  if (box) return trigger("point", { box });
  if (moved || tool === "box") return;
  const beside = tool === "remove" || event.button === 2 || event.shiftKey;
  trigger("point", { point: [...from, beside ? 0 : 1] });
};
svg.onpointercancel = () => { start = null; draw(); };
svg.oncontextmenu = (event) => event.preventDefault();

function act(what, more = {}) { trigger("act", { act: what, ...more }); }
const actions = {
  undo: () => act("undo"),
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
  if (!element.isConnected || event.target.closest("input, textarea")) return;
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
  add: "Click on a thing to name it; another click refines it. Drag to box a thing.",
  remove: "Click where the chosen object should not be.",
  box: "Drag a box around a thing.",
};

function draw() {
  const [width, height] = state.size ?? [1, 1];
  const pixel = width / (svg.clientWidth || width);  // one pixel of the screen
  find(".view").style.setProperty("--ratio", width / height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.dataset.tool = tool;
  svg.replaceChildren();
  tags.replaceChildren();
  const shown = state.shapes.filter((one) => !one.hidden).sort((a, b) => b.area - a.area);  // small ones on top
  for (const one of shown) {
    const classes = "object" + (one.key === state.active ? " active" : "");
    const outline = shape("path", { d: one.path, fill: one.colour, stroke: one.colour, class: classes, "data-key": one.key });
    outline.append(shape("title", {}));
    outline.firstChild.textContent = one.label;
    svg.append(outline);
    const tag = document.createElement("span");
    tag.textContent = one.key === state.active ? `${one.label} ${one.score.toFixed(2)}` : one.label;
    tag.dataset.key = one.key;
    tag.className = classes;
    tag.style.cssText = `left:${one.box[0] / width * 100}%;top:${one.box[1] / height * 100}%;--colour:${one.colour}`;
    tags.append(tag);
  }
  const box = start?.box ?? state.prompts.box;
  if (box) svg.append(shape("rect", { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1], class: "prompt" }));
  for (const [x, y, label] of state.prompts.points ?? [])
    svg.append(shape("circle", { cx: x, cy: y, r: 6 * pixel, class: label ? "on" : "beside" }));
  for (const button of stage.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  find("[data-do=undo]").disabled = !state.undo;
  find("[data-do=done]").disabled = !state.active;
  const names = (state.names ?? []).map(([name, score]) => `${name} ${score.toFixed(2)}`).join(" · ");
  find(".hint").textContent = names || HINTS[tool];
}

watch("value", () => {
  state = props.value;
  complain("");
  if (state.picture) image.src = state.picture;
  drop.hidden = !!state.size;
  stage.hidden = !state.size;
  draw();
});
new ResizeObserver(draw).observe(image);
document.addEventListener("ovsam-hover", ({ detail }) => {
  for (const node of element.querySelectorAll(".object")) node.classList.toggle("hover", node.dataset.key === detail);
});
