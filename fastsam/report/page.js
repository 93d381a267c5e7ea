"use strict";
// Color scheme, hidden runs and tables. charts.js draws the figures and listens to the event "change-of-view".

document.documentElement.classList.add("with-script");
const report = JSON.parse(document.getElementById("report-data").textContent);
const hiddenRuns = new Set();
const changed = () => document.dispatchEvent(new Event("change-of-view"));

// Color scheme: that of the system until the reader chooses one.
{
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    changed();
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  button.setAttribute("aria-pressed", String(isDark()));
}

// Runs: a rule of the style sheet hides whatever belongs to a hidden one.
{
  const rules = document.head.appendChild(document.createElement("style"));
  const toggles = [...document.querySelectorAll("[data-toggle]")];
  const filter = document.getElementById("runs-filter");
  const status = document.getElementById("runs-status");
  const show = () => {
    for (const toggle of toggles) toggle.setAttribute("aria-pressed", String(!hiddenRuns.has(toggle.dataset.toggle)));
    rules.textContent = [...hiddenRuns].map((run) => `main [data-run="${run}"] { display: none; }`).join("\n");
    status.textContent = hiddenRuns.size ? `${hiddenRuns.size} of ${toggles.length} hidden` : "";
    changed();
  };
  for (const toggle of toggles) {
    toggle.addEventListener("click", () => {
      const run = toggle.dataset.toggle;
      if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
      show();
    });
  }
  filter.addEventListener("input", () => {
    for (const toggle of toggles) toggle.parentElement.hidden = !contains(toggle, filter.value);
  });
  document.getElementById("runs-only").addEventListener("click", () => {
    hiddenRuns.clear();
    for (const toggle of toggles) if (toggle.parentElement.hidden) hiddenRuns.add(toggle.dataset.toggle);
    show();
  });
  document.getElementById("runs-all").addEventListener("click", () => {
    hiddenRuns.clear();
    show();
  });
}

function contains(element, words) {
  const text = element.textContent.toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

// Tables: sorted by the button in a header, filtered by words, copied as they are shown.
for (const box of document.querySelectorAll("[data-table]")) {
  const body = box.querySelector("tbody");
  const headers = [...box.querySelectorAll("thead th")];
  const filter = box.querySelector("[data-filter]");

  for (const button of box.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const header = button.closest("th");
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortRows(body, Number(button.dataset.sort), header.classList.contains("number"), ascending);
    });
  }
  filter.addEventListener("input", () => {
    for (const row of body.rows) row.hidden = !contains(row, filter.value);
  });
  for (const button of box.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(box, button.dataset.copy));
  }
}

function sortRows(body, column, numeric, ascending) {
  const key = (row) => {
    const text = row.cells[column].textContent;
    return numeric ? Number.parseFloat(text) : text;
  };
  const compare = (a, b) => {
    if (!numeric) return a.localeCompare(b, "en", { numeric: true });
    return a - b;
  };
  const missing = (value) => value === "" || Number.isNaN(value); // always last
  const rows = [...body.rows].map((row) => [key(row), row]);
  rows.sort(([a], [b]) => missing(a) - missing(b) || (missing(a) ? 0 : (ascending ? 1 : -1) * compare(a, b)));
  body.append(...rows.map(([, row]) => row));
}

// The visible part of a table as CSV, Markdown or LaTeX; every cell is there, escaped for each of them.
function tableText(box, format) {
  const visible = (element) => getComputedStyle(element).display !== "none";
  const columns = [...box.querySelectorAll("thead th")].map(visible);
  const rows = [...box.querySelectorAll("tbody tr")].filter(visible).map((row) => Number(row.dataset.row));
  const lines = report.tables[box.dataset.table][format];
  const text = ([start, cells, between, end]) => start + cells.filter((_, i) => columns[i]).join(between) + end;
  const first = lines.findIndex((line) => line[4] !== null);
  const around = (part) => part.filter((line) => line[4] === null).map(text);
  const byRow = new Map(lines.map((line) => [line[4], line]));
  const before = first < 0 ? lines : lines.slice(0, first);
  const after = first < 0 ? [] : lines.slice(first);
  return [...around(before), ...rows.map((row) => text(byRow.get(row))), ...around(after), ""].join("\n");
}

async function copy(box, format) {
  const text = tableText(box, format);
  const status = box.querySelector("[role=status]");
  try {
    await navigator.clipboard.writeText(text);
    status.textContent = "Copied.";
  } catch {
    // Without permission the reader copies it.
    const dialog = document.getElementById("copy");
    const area = dialog.querySelector("textarea");
    area.value = text;
    dialog.showModal();
    area.select();
  }
}

// One of several figures.
for (const choice of document.querySelectorAll("[data-choice]")) {
  choice.addEventListener("change", () => {
    const figures = choice.closest("section").querySelectorAll("figure");
    figures.forEach((figure, place) => { figure.hidden = place !== Number(choice.value); });
  });
}
