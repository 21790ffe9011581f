"use strict";

// ---- plots, in the page's colours
const dark = matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const changes = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  changes["font.color"] = color("--ink");
  for (const axis of ["xaxis", "yaxis"]) {
    changes[`${axis}.gridcolor`] = color("--line");
    changes[`${axis}.linecolor`] = color("--line");
    changes[`${axis}.zeroline`] = false;
  }
  (layout.shapes || []).forEach((_, i) => {
    changes[`shapes[${i}].line.color`] = color("--ink");
  });
  return changes;
}

for (const plot of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
  const draw = () => Plotly.relayout(plot, themed(layout));
  Plotly.newPlot(plot, data, layout, { responsive: true, displayModeBar: false }).then(draw);
  dark.addEventListener("change", draw);
}

// ---- tables
function compare(a, b, column) {
  const [x, y] = [a.cells[column], b.cells[column]];
  if (x.dataset.value && y.dataset.value) return Number(x.dataset.value) - Number(y.dataset.value);
  return x.textContent.localeCompare(y.textContent, "en", { numeric: true });
}

for (const table of document.querySelectorAll(".table")) {
  const body = table.querySelector("tbody");
  const rows = [...body.rows];
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const sign = descending ? -1 : 1;
      body.append(...rows.sort((a, b) => sign * compare(a, b, column)));
    });
  });
  const filter = table.querySelector("input");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    table.querySelector("output").textContent = `${shown} of ${rows.length} rows`;
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
