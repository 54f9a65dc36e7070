"""Style sheet and script of the report. Plain CSS and JavaScript, kept here so that the page needs no other file."""

STYLE = """
:root {
  --bg: #f6f7f9; --card: #ffffff; --ink: #17202b; --muted: #5a6675; --faint: #a4adba; --line: #dde1e7;
  --grid: #eceff3; --accent: #2457d6; --good: #15703f; --bad: #b3261e; --warn: #b26a00;
  --warn-bg: #fff6e5; --bad-bg: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #0f1318; --card: #171c23; --ink: #e6eaf0; --muted: #9aa6b5; --faint: #5f6b7a; --line: #2a313b;
    --grid: #222932; --accent: #7aa5ff; --good: #5cc98a; --bad: #ff8a80; --warn: #f0b45b;
    --warn-bg: #2a2212; --bad-bg: #2e1a19;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 48px 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 110ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 13px; }
.lead span { white-space: nowrap; }
.lead span:not(:last-child)::after { content: "·"; margin: 0 8px; color: var(--faint); }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; margin: 8px 0 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 12px; margin: 28px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; min-width: 0; }
.tile b { display: block; font-size: 24px; line-height: 1.3; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 13px; font-weight: 600; line-height: 1.4; }
.tile small { display: block; font-size: 12.5px; color: var(--muted); line-height: 1.4; margin-top: 4px;
  overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; margin: 12px 0; }
.chart { height: 360px; }
.chart.low { height: 300px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 12px 0; }
.scroll.tall { max-height: 460px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 8px 14px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > td, tr:last-child > th[scope=row] { border-bottom: 0; }
thead th { font-size: 12px; font-weight: 600; color: var(--muted); white-space: nowrap; background: var(--card); }
.tall thead th { position: sticky; top: 0; box-shadow: 0 1px 0 var(--line); }
th[scope=row] { font-weight: 500; white-space: nowrap; }
.keep { white-space: nowrap; }
.wide { min-width: 14em; }
.num { text-align: right; white-space: nowrap; }
tr.this > * { background: color-mix(in srgb, var(--accent) 9%, transparent); }
thead th button { all: unset; cursor: pointer; }
thead th button:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); } .dim { color: var(--muted); }
.notice { border: 1px solid var(--line); border-left: 3px solid var(--warn); background: var(--warn-bg);
  border-radius: 8px; padding: 12px 16px; margin: 12px 0 0; }
.notice.bad { border-left-color: var(--bad); background: var(--bad-bg); color: inherit; }
.notice ul { margin: 4px 0 0; padding-left: 20px; }
.notice li { overflow-wrap: anywhere; }
.notices { margin-top: 20px; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--muted); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 20px; margin: 0; font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  main { padding: 24px 16px 48px; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile b { font-size: 21px; }
  .card { padding: 14px 12px; }
  .chart { height: 340px; }
  th, td { padding: 7px 10px; }
  table:not(.sortable) th[scope=row] { white-space: normal; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print {
  body { background: none; }
  .card, .scroll, .notice { break-inside: avoid; }
  .scroll.tall { max-height: none; }
}
"""

SCRIPT = """
(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const coarse = matchMedia("(pointer: coarse)");

  // "var(--accent)" -> its value under the reader's colour scheme, anywhere in a specification
  function resolve(value, style) {
    if (typeof value === "string") {
      const match = /^var\\((--[a-z-]+)\\)$/.exec(value);
      return match ? style.getPropertyValue(match[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolve(item, style));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    }
    return value;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = resolve(figure, style);
      if (coarse.matches) layout.dragmode = false; // a finger that scrolls the page must not zoom the plot
      Plotly.react(id, data, layout, { responsive: true, displayModeBar: false });
    }
  }

  // Tables marked sortable: a click on a head sorts by the cells' data-value, or by their text
  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const direction = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const body = table.tBodies[0];
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          const numeric = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
          return direction * (numeric ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true }));
        });
        body.append(...rows);
      });
    });
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.querySelectorAll("table.sortable").forEach(sortable);
})();
"""
