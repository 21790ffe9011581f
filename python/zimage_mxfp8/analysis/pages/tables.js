// ---- tables
const exact = (cell) =>
  cell.dataset.v ??
  (cell.classList.contains("number") ? cell.textContent.replaceAll(",", "") : cell.textContent);

function compare(a, b, column) {
  const [x, y] = [a.cells[column], b.cells[column]];
  const [isNumber, other] = [x, y].map((cell) => cell.classList.contains("number"));
  if (isNumber && other) return Number(exact(x)) - Number(exact(y));
  if (isNumber !== other) return isNumber ? -1 : 1; // words after numbers
  return x.textContent.localeCompare(y.textContent, "en", { numeric: true });
}

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

for (const table of document.querySelectorAll(".table")) {
  const body = table.querySelector("tbody");
  const rows = [...body.rows];
  const heads = [...table.querySelectorAll("thead th")];
  const titles = heads.map((head) => head.textContent);
  for (const row of rows) {
    [...row.cells].forEach((cell, column) => (cell.dataset.title = titles[column]));
  }
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
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    const counts = [shown, rows.length].map((count) => count.toLocaleString("en"));
    table.querySelector("output").textContent = `${counts[0]} of ${counts[1]} rows`;
  });
  table.querySelector(".csv").addEventListener("click", () => {
    const lines = [titles, ...[...body.rows].map((row) => [...row.cells].map(exact))];
    const text = lines.map((line) => line.map(quoted).join(",") + "\r\n").join("");
    save(`${table.dataset.name}.csv`, new Blob([text], { type: "text/csv" }));
  });
}
