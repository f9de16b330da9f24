// The list of objects: class names with their scores, and the actions of a user. Gradio hands in element, trigger,
// props and watch. All text goes in as text, never as HTML.

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) key in made ? (made[key] = value) : made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const dot = (colour) => node("i", { className: "dot", style: `background:${colour}` });
const act = (what, key, more = {}) => trigger("act", { act: what, key, ...more });
const ICONS = {
  rename: "M3 13l1-4 7-7 3 3-7 7zM10 3l3 3",
  hide: "M1 8q7-9 14 0q-7 9-14 0zM8 6a2 2 0 1 0 .01 0z",
  show: "M1 8q7 9 14 0M2 14L14 2",
  alike: "M2 2h5v5H2zM9 2h5v5H9zM2 9h5v5H2zM9 9h5v5H9z",
  delete: "M3 3l10 10M13 3L3 13",
};
function button(icon, title, onclick, label = "") {
  const made = node("button", { title, "aria-label": title, onclick: (event) => { event.stopPropagation(); onclick(); } });
  made.innerHTML = `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${ICONS[icon]}"/></svg>`;
  if (label) made.append(node("span", {}, label));
  return made;
}

function rename(row, line) {
  const field = node("input", { value: row.label, maxLength: 200, "aria-label": "New name" });
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    if (keep && field.value.trim() && field.value.trim() !== row.label) act("rename", row.key, { label: field.value });
    else draw();
  };
  field.onclick = (event) => event.stopPropagation();
  field.onkeydown = (event) => { if (event.key === "Enter") finish(true); if (event.key === "Escape") finish(false); };
  field.onblur = () => finish(true);
  line.querySelector(".label").replaceWith(field);
  field.focus();
  field.select();
}

function item(row, active) {
  const toggle = row.hidden ? "Show" : "Hide";
  const buttons = (labelled) => [
    button("rename", "Rename", () => rename(row, line), labelled && "Rename"),
    button(row.hidden ? "show" : "hide", toggle, () => act("hide", row.key), labelled && toggle),
    button("alike", "Find similar objects", () => trigger("alike", { key: row.key }), labelled && "Find similar"),
    button("delete", "Delete", () => act("delete", row.key), labelled && "Delete")];
  const line = node("div", { className: "line" },
    dot(row.colour), node("span", { className: "label" }, row.label),
    node("span", { className: "score", title: "Score" }, row.score.toFixed(2)),
    ...(active ? [] : buttons(false)));
  const entry = node("li", { className: (active ? "active " : "") + (row.hidden ? "hidden" : "") }, line);
  line.onclick = () => act("activate", active ? "" : row.key);
  const hover = (key) => document.dispatchEvent(new CustomEvent("ovsam-hover", { detail: key }));
  entry.onmouseenter = () => hover(row.key);
  entry.onmouseleave = () => hover("");
  if (active) {
    const names = row.names.map(([name, score]) => node("button",
      { className: "name", title: `Call it ${name}`, onclick: () => act("rename", row.key, { label: name }) },
      node("span", {}, name), node("b", { style: `width:${Math.round(score * 100)}%` }), node("span", {}, score.toFixed(2))));
    entry.append(node("div", { className: "buttons" }, ...buttons(true)), node("div", { className: "names" }, ...names),
      node("div", { className: "facts" }, `mask quality ${row.maskScore.toFixed(2)} · ${row.area.toLocaleString("en")} pixels`));
  }
  return entry;
}

function draw() {
  const { rows = [], counts = [], active = "", absent = [], below = 0, lower = null, asked = false } = props.value ?? {};
  const top = element.querySelector("ul")?.scrollTop ?? 0;
  const several = counts.filter(([, count]) => count > 1).map(([label, count]) => `${count} ${label}`).join(", ");
  const title = rows.length ? `Objects (${rows.length})` + (several ? `: ${several}` : "") : "Objects";
  element.replaceChildren(node("h3", {}, title));
  if (rows.length) element.append(node("ul", {}, ...rows.map((row) => item(row, row.key === active))));
  else if (!asked) element.append(node("p", {}, "None yet; click on an object, or type words."));
  else if (!below && !absent.length) element.append(node("p", {}, "No objects were found."));
  if (absent.length) element.append(node("ul", { className: "absent" }, ...absent.map((line) => node("li", {}, line))));
  if (below) {
    const text = rows.length ? `${below} more below the filters.` : `No object passes the filters; ${below} are below.`;
    const offer = lower === null ? [] : [node("button", { className: "lower", onclick: () => trigger("lower", { score: lower }) }, `Lower the confidence to ${lower.toFixed(2)}`)];
    element.append(node("p", {}, text, ...offer));
  }
  const [list, chosen] = [element.querySelector("ul"), element.querySelector("li.active")];
  if (chosen) list.scrollTop = Math.min(chosen.offsetTop, Math.max(top, chosen.offsetTop + chosen.offsetHeight - list.clientHeight));
  else if (list) list.scrollTop = top;
}

watch("value", draw);
draw();
