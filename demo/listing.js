// The list of objects: names with their scores, and what a person can do to them. Gradio hands in element, trigger,
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
function button(icon, title, onclick) {
  const made = node("button", { title, "aria-label": title, onclick: (event) => { event.stopPropagation(); onclick(); } });
  made.innerHTML = `<svg viewBox="0 0 16 16"><path d="${ICONS[icon]}"/></svg>`;
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
  const line = node("div", { className: "line" },
    dot(row.colour), node("span", { className: "label" }, row.label),
    node("span", { className: "score", title: "score" }, row.score.toFixed(2)),
    button("rename", "Rename", () => rename(row, line)),
    button(row.hidden ? "show" : "hide", row.hidden ? "Show" : "Hide", () => act("hide", row.key)),
    button("alike", "Find all like this", () => trigger("alike", { key: row.key })),
    button("delete", "Delete", () => act("delete", row.key)));
  const entry = node("li", { className: (active ? "active " : "") + (row.hidden ? "hidden" : "") }, line);
  line.onclick = () => act("activate", active ? "" : row.key);
  const hover = (key) => document.dispatchEvent(new CustomEvent("ovsam-hover", { detail: key }));
  entry.onmouseenter = () => hover(row.key);
  entry.onmouseleave = () => hover("");
  if (active) {
    const names = row.names.map(([name, score]) => node("button",
      { className: "name", title: `Call it ${name}`, onclick: () => act("rename", row.key, { label: name }) },
      node("span", {}, name), node("b", { style: `width:${Math.round(score * 100)}%` }), node("span", {}, score.toFixed(2))));
    entry.append(node("div", { className: "names" }, ...names), node("div", { className: "facts" }, `mask score ${row.maskScore.toFixed(2)} · ${row.area.toLocaleString("en")} pixels`));
  }
  return entry;
}

function draw() {
  const { rows = [], counts = [], active = "", left = "" } = props.value ?? {};
  const top = element.querySelector("ul")?.scrollTop ?? 0;
  const table = node("table", {}, ...counts.map(([label, count, colour]) => node("tr", {}, node("td", {}, dot(colour), label), node("td", {}, String(count)))));
  element.replaceChildren(
    node("h3", {}, rows.length ? `Objects (${rows.length})` : "Objects"),
    rows.length ? node("ul", {}, ...rows.map((row) => item(row, row.key === active))) : node("p", {}, left || "None yet: click on a thing, or name some."));
  if (rows.length && left) element.append(node("p", {}, left));
  if (rows.length) element.append(node("details", { open: true }, node("summary", {}, "Counts"), table));
  const [list, chosen] = [element.querySelector("ul"), element.querySelector("li.active")];
  if (chosen) list.scrollTop = Math.min(chosen.offsetTop, Math.max(top, chosen.offsetTop + chosen.offsetHeight - list.clientHeight));
  else if (list) list.scrollTop = top;
}

watch("value", draw);
draw();
