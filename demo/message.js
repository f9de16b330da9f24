// One place for messages: from the server, or from another script of the tab by the event "ovsam-message". While
// something runs or waits it counts the seconds and offers to cancel.

element.setAttribute("role", "status");
element.classList.add("say");
let timer = null, since = null;

function say(message) {
  const { text, share = null, busy = false } = typeof message === "object" && message ? message : { text: message };
  clearInterval(timer);
  since = busy ? since ?? Date.now() : null;
  element.hidden = !text;
  element.replaceChildren();
  if (!text) return;
  const line = document.createElement("span");
  line.textContent = text;
  element.append(line);
  if (!busy) return;
  const button = document.createElement("button");
  button.textContent = "Cancel";
  button.onclick = () => trigger("cancel");
  element.prepend(button);
  const count = () => { line.textContent = `${text} · ${Math.round((Date.now() - since) / 1000)} s`; };
  count();
  timer = setInterval(count, 1000);
  if (share === null) return;
  const bar = document.createElement("div"), filled = document.createElement("i");
  bar.className = "bar";
  filled.style.width = `${share * 100}%`;
  bar.append(filled);
  element.append(bar);
}
watch("value", () => say(props.value));
say(props.value);
(element.closest("[role=tabpanel]") ?? document).addEventListener("ovsam-message", ({ detail }) => say(detail));
