
"use strict";
const units = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
function figure(cell) {
  const last = cell.textContent.split("→").pop();
  const found = last.match(/(-?[\d.]+(?:e[+-]?\d+)?)\s*([kMGT]?)/);
  return found ? Number(found[1]) * (units[found[2]] || 1) : last.includes("exact") ? Infinity : NaN;
}
function sort(parent, rows, key, falling) {
  const keyed = rows.map((row, at) => [key(row), at, row]);
  const words = keyed.some(([value]) => typeof value === "string" || Number.isNaN(value));
  keyed.sort(([one, at], [other, next]) =>
    (falling ? -1 : 1) * (words ? String(one).localeCompare(String(other)) : one < other ? -1 : one > other ? 1 : 0) || at - next);
  parent.append(...keyed.map(([, , row]) => row));
}
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("thead th")];
  heads.forEach((head, at) => {
    const act = () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const body = table.tBodies[0], rows = [...body.rows];
      const numbers = rows.every((row) => !Number.isNaN(figure(row.cells[at])) || !row.cells[at].textContent.trim());
      sort(body, rows, (row) => (numbers && at ? figure(row.cells[at]) || 0 : row.cells[at].textContent), falling);
    };
    head.tabIndex = 0;
    head.addEventListener("click", act);
    head.addEventListener("keydown", (event) => event.key === "Enter" && act());
  });
}
const longest = (row) => Math.max(...[...row.querySelectorAll("rect")].map((each) => Number(each.getAttribute("width"))));
for (const bars of document.querySelectorAll(".bars")) {
  const rows = [...bars.querySelectorAll(".row")], line = document.createElement("p");
  if (rows.length < 4) continue;
  line.className = "sort";
  const ways = { "in order": () => bars.append(...rows), "longest first": () => sort(bars, rows, longest, true),
    "shortest first": () => sort(bars, rows, longest, false), "by name": () => sort(bars, rows, (row) => row.textContent, false) };
  for (const [name, act] of Object.entries(ways)) {
    const button = document.createElement("button");
    button.textContent = name;
    button.addEventListener("click", act);
    line.append(button, " ");
  }
  bars.before(line);
}
const find = document.getElementById("find");
if (find) {
  find.hidden = false;
  find.addEventListener("input", () => {
    const word = find.value.toLowerCase();
    for (const each of document.querySelectorAll("#difference .place, #difference li"))
      each.hidden = !each.textContent.toLowerCase().includes(word);
  });
}
