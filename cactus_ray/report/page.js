"use strict";

// Rows are sorted by the cells' data-value: as numbers where both are numbers, else as text with digits in natural
// order. Cells without a value stay last in both directions.
function compareValues(a, b, descending) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const x = Number(a), y = Number(b);
  const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  return descending ? -order : order;
}

function sortedOrder(values, descending) {
  return values.map((_, i) => i).sort((i, j) => compareValues(values[i], values[j], descending) || i - j);
}

function makeSortable(table) {
  const headers = Array.from(table.tHead.rows[0].cells);
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : header.dataset.first === "descending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0], rows = Array.from(body.rows);
      const values = rows.map((row) => row.cells[column].dataset.value || "");
      sortedOrder(values, descending).forEach((i) => body.appendChild(rows[i]));
    });
  });
}

function filterFront(box, table) {
  const apply = () => {
    for (const row of table.tBodies[0].rows) row.hidden = box.checked && !row.classList.contains("front");
  };
  box.addEventListener("change", apply);
  apply();
}

function draw(figures) {
  // Plotly's own default offers to send the chart to its cloud.
  const offline = { showSendToCloud: false, plotlyServerURL: "" };
  const config = { ...offline, responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  for (const [id, figure] of Object.entries(figures)) {
    const place = document.getElementById(id);
    const bar = place && "bar" in place.dataset ? "hover" : false;
    if (place) Plotly.newPlot(place, figure.data, figure.layout, { ...config, displayModeBar: bar });
  }
}

function chooseCurves(place) {
  document.querySelectorAll("[data-curves]").forEach((button) => {
    button.addEventListener("click", () => {
      const wanted = (trace) => button.dataset.curves === "all" || (button.dataset.curves === "front" && trace.meta === "front");
      Plotly.restyle(place, "visible", place.data.map((trace) => (wanted(trace) ? true : "legendonly")));
    });
  });
}

if (typeof module !== "undefined") module.exports = { compareValues, sortedOrder };
if (typeof document !== "undefined") {
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  const box = document.getElementById("front-only");
  if (box) filterFront(box, document.getElementById("points"));
  draw(JSON.parse(document.getElementById("figures").textContent));
  const lines = document.getElementById("parallel-data");
  if (lines) parallel(document.getElementById("parallel"), JSON.parse(lines.textContent));
  const curves = document.getElementById("curves");
  if (curves) chooseCurves(curves);
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll(".chart").forEach((c) => { if (c.data) Plotly.Plots.resize(c); });
  });
}
