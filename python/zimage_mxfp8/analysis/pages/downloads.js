// ---- files that the page makes
function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A drawing of the page as PNG, at twice its size, in the page's colours.
async function savePng(drawing, name) {
  const shown = getComputedStyle(document.documentElement);
  const copy = drawing.cloneNode(true);
  const [, , width, height] = drawing.getAttribute("viewBox").split(" ").map(Number);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.style.display = "block";
  copy.style.font = getComputedStyle(drawing).font;
  for (const color of ["ink", "faint", "line", "ground", "raised", "accent", "good", "bad"]) {
    copy.style.setProperty(`--${color}`, shown.getPropertyValue(`--${color}`));
  }
  const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
  style.textContent = document.querySelector("style").textContent;
  copy.prepend(style);
  const image = new Image();
  const words = new XMLSerializer().serializeToString(copy);
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(words)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  const margin = 16;
  [canvas.width, canvas.height] = [2 * (width + 2 * margin), 2 * (height + 2 * margin)];
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.fillStyle = shown.getPropertyValue("--ground");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, margin, margin, width, height);
  canvas.toBlob((blob) => save(`${name}.png`, blob));
}

for (const button of document.querySelectorAll("button.png")) {
  button.addEventListener("click", () => {
    const drawings = [...button.closest(".network, .chart").querySelectorAll("svg")];
    const drawing = drawings.find((one) => getComputedStyle(one).display !== "none");
    const name = drawing.classList.contains("map") ? "network" : "size-and-error";
    savePng(drawing, name);
  });
}

// ---- texts to copy
for (const block of document.querySelectorAll(".copyable")) {
  const button = block.querySelector("button");
  const text = block.querySelector("pre");
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(text); // for Ctrl+C where scripts may not copy
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected: press Ctrl+C";
    }
  });
}
