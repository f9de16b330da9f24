// Choosing a file by dropping it, by a click or by a key, for the components of canvas.js and player.js.

function complain(detail) {
  element.dispatchEvent(new CustomEvent("ovsam-message", { bubbles: true, detail }));
}

// Uploads the chosen file and triggers the event `kind` with its path; `advice` is for files that are too large.
function acceptFiles(kind, advice) {
  const drop = element.querySelector(".drop"), input = element.querySelector("input[type=file]");

  async function take(file) {
    if (!file) return;
    complain("");
    if (file.size > props.megabytes * 1e6) return complain(`${file.name} has more than ${props.megabytes} MB; ${advice}.`);
    drop.classList.add("busy");
    try {
      const { path } = await upload(file);
      trigger(kind, { path });
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
  return { take, choose };
}

