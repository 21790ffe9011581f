// ---- the map of the network
// Three digits, as Python's format ".3g".
function rounded(value) {
  const short = Number(value.toPrecision(3));
  if (short === 0 || Math.abs(short) >= 1e-4) return String(short);
  return short.toExponential().replace(/e-(\d)$/, "e-0$1");
}

function sizeText(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  for (const unit of ["KiB", "MiB"]) {
    bytes /= 1024;
    if (bytes < 1024) return `${bytes.toFixed(1)} ${unit}`;
  }
  return `${(bytes / 1024).toFixed(2)} GiB`;
}

// As the package's merged_pattern: names that differ in their block's number are merged.
function mergedPattern(names, whole) {
  const escaped = (text) => text.replace(/[()[\]{}?*+\-|^$\\.&~# \t\n\r\v\f]/g, "\\$&");
  const groups = new Map();
  for (const name of [...names].sort()) {
    const match = /^(.*?\.)(0|[1-9][0-9]*)(\..+)$/s.exec(name);
    const key = JSON.stringify(match ? [match[1], match[3]] : [name, ""]);
    if (!groups.has(key)) groups.set(key, []);
    if (match) groups.get(key).push(match[2]);
  }
  const alternatives = [...groups].map(([key, numbers]) => {
    const [head, tail] = JSON.parse(key);
    if (!numbers.length) return escaped(head);
    numbers.sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
    return `${escaped(head)}(${numbers.join("|")})${escaped(tail)}`;
  });
  const pattern = alternatives.join("|");
  return pattern && whole ? `^(${pattern})$` : pattern;
}

for (const network of document.querySelectorAll(".network")) {
  const { layers, palette, metrics, keep } = JSON.parse(
    network.querySelector("script").textContent,
  );
  const find = (selector) => network.querySelector(selector);
  const cells = [...network.querySelectorAll(".cell")];
  const ranks = new Map();
  (keep?.names ?? []).forEach((name, i) => ranks.set(name.replace(/\.weight$/, ""), i));

  // Colours
  for (const radio of network.querySelectorAll("[name=metric]")) {
    radio.addEventListener("change", () => {
      const metric = metrics[radio.value];
      for (const cell of cells) {
        const level = metric.levels[cell.dataset.i];
        cell.firstChild.setAttribute("fill", level === null ? "none" : palette[level]);
      }
      for (const legend of network.querySelectorAll(".legend")) {
        legend.querySelectorAll(".colors").forEach((colors, i) => {
          colors.toggleAttribute("hidden", i !== Number(radio.value));
        });
      }
      find(".note").textContent = metric.note;
    });
  }

  // Figures of a layer
  const reading = find(".reading");
  const read = (event) => {
    const i = event.target.closest?.(".cell")?.dataset.i;
    if (i === undefined) return;
    const name = document.createElement("b");
    name.textContent = layers[i];
    const rank = ranks.get(layers[i]);
    const order = rank === undefined ? "" : `, number ${keep.always.length + rank + 1} to keep`;
    const figures = metrics.map((metric) => `${metric.title}: ${metric.texts[i]}`).join(" · ");
    reading.replaceChildren(name, `${order} — ${figures}`);
    cells.forEach((cell) => cell.classList.toggle("pointed", cell.dataset.i === i));
  };
  for (const kind of ["pointerover", "click"]) find(".maps")?.addEventListener(kind, read);

  if (!keep) continue;
  // Kept layers
  const bar = find("#keep");
  const recommended = bar.defaultValue;
  const show = () => {
    const total = Number(bar.value);
    const count = total - keep.always.length; // of those whose order is known
    const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
    const bytes = keep.smallest + sum(keep.added.slice(0, count));
    let error = keep.rest + sum(keep.parts.slice(count));
    if (keep.root) error = Math.sqrt(Math.max(error, 0));
    find(".count").textContent = total.toLocaleString("en");
    find(".size").textContent = sizeText(bytes);
    find(".error").textContent = keep.percent ? `${rounded(100 * error)} %` : rounded(error);
    if (keep.measured) {
      const measured = keep.measured.includes(count);
      find(".how").textContent = measured
        ? "this error was measured"
        : "this error is estimated";
    }
    for (const cell of cells) {
      const rank = ranks.get(layers[cell.dataset.i]);
      if (rank !== undefined) cell.classList.toggle("kept", rank < count);
    }
    const kept = [...keep.always, ...keep.names.slice(0, count)];
    find(".copyable pre").textContent = mergedPattern(
      kept.map((name) => keep.prefix + name),
      keep.whole,
    );
    find(".copyable button").textContent = "Copy";
    for (const drawing of document.querySelectorAll(".chart svg")) {
      const [x, y] = drawing.dataset.points.split(" ")[count].split(",");
      const cursor = drawing.querySelector(".cursor");
      cursor.setAttribute("cx", x);
      cursor.setAttribute("cy", y);
    }
  };
  bar.addEventListener("input", show);
  find(".reset").addEventListener("click", () => {
    bar.value = recommended;
    show();
  });
}
