"use strict";

// Parallel coordinates: a line per trial, an axis per parameter and objective, from the data of parallel.py. Pointing at a
// line names its trial and values; a drag along an axis selects, a drag of an axis's name moves it. Texts come from
// users and are only ever set as text. Places run from 0 (bottom) to 1 (top); null: the parameter is inactive.
const parallel = (() => {
  const TOP = 78, HEIGHT = 300, LANE = TOP + HEIGHT + 30, LEFT = 84, RIGHT = 52, SPACING = 93, REACH = 14;
  const SHADES = ["#7ad151", "#22a884", "#2a788e", "#414487", "#440154"]; // Viridis without its yellow; the best is dark
  const UNMET = "#9aa5b1";

  const yOf = (place) => (place === null ? LANE : TOP + HEIGHT * (1 - place));

  function svg(parent, name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  function shade(share) {
    const at = Math.min(Math.max(share, 0), 1) * (SHADES.length - 1), i = Math.min(Math.floor(at), SHADES.length - 2);
    const channel = (colour, k) => parseInt(colour.slice(1 + 2 * k, 3 + 2 * k), 16);
    const mixed = [0, 1, 2].map((k) => Math.round(channel(SHADES[i], k) * (i + 1 - at) + channel(SHADES[i + 1], k) * (at - i)));
    return `rgb(${mixed.join(",")})`;
  }

  function colourOf(chart, line) {
    const { axis, goal } = chart.data.colours[chart.colour], place = line.places[axis];
    return !line.met || place === null ? UNMET : shade(goal === "maximize" ? place : 1 - place);
  }

  // Two paths: where a line has values at both ends, and the dashed ways to and from an inactive parameter.
  function paths(chart, line) {
    let solid = "", dashed = "";
    for (let k = 1; k < chart.order.length; k++) {
      const [a, b] = [line.places[chart.order[k - 1]], line.places[chart.order[k]]];
      const step = `M${chart.x[k - 1].toFixed(1)} ${yOf(a).toFixed(1)}L${chart.x[k].toFixed(1)} ${yOf(b).toFixed(1)}`;
      if (a === null || b === null) dashed += step;
      else solid += step;
    }
    return [["solid", solid], ["dashed", dashed]].filter(([, d]) => d);
  }

  const passes = (chart, line) =>
    (!chart.frontOnly || line.front) &&
    Array.from(chart.brushes).every(([axis, [top, bottom]]) => {
      const y = yOf(line.places[axis]);
      return top <= y && y <= bottom;
    });

  function drawLines(chart) {
    const { lines } = chart.data, opacity = Math.min(Math.max(7 / Math.sqrt(lines.length), 0.25), 0.85);
    chart.selected = lines.filter((line) => passes(chart, line));
    const selected = new Set(chart.selected), { axis, goal } = chart.data.colours[chart.colour];
    const rank = (line) => (line.met ? (goal === "maximize" ? 1 : -1) * line.places[axis] : -9);
    chart.under.replaceChildren();
    // What is selected lies above the rest, the best on top.
    for (const line of [...lines].sort((a, b) => selected.has(a) - selected.has(b) || rank(a) - rank(b))) {
      const chosen = selected.has(line);
      const group = svg(chart.under, "g", { class: chosen ? "line" : "line out", "data-trial": line.trial });
      if (chosen) group.setAttribute("stroke", colourOf(chart, line));
      group.setAttribute("stroke-width", line.front ? 2.2 : 1.1);
      group.setAttribute("stroke-opacity", chosen ? (line.front ? 0.9 : opacity) : 1);
      for (const [kind, d] of paths(chart, line)) svg(group, "path", { class: kind, d });
    }
    const all = chart.selected.length === lines.length;
    chart.status.textContent = all ? `${lines.length} trials` : `${chart.selected.length} of ${lines.length} trials selected`;
    chart.reset.disabled = !chart.brushes.size;
  }

  function drawAxis(chart, k) {
    const index = chart.order[k], axis = chart.data.axes[index], x = chart.x[k];
    const group = svg(chart.axes, "g", { class: "axis", transform: `translate(${x},0)` });
    svg(group, "line", { y1: TOP, y2: TOP + HEIGHT });
    for (const [place, text] of axis.ticks) {
      svg(group, "line", { x1: -4, x2: 0, y1: yOf(place), y2: yOf(place) });
      const shown = text.length > 12 ? `${text.slice(0, 11)}…` : text;
      const label = svg(group, "text", { x: -7, y: yOf(place), dy: "0.32em", "text-anchor": "end" }, shown);
      if (shown !== text) svg(label, "title", {}, text);
    }
    if (chart.data.lines.some((line) => line.places[index] === null)) {
      svg(group, "circle", { cy: LANE, r: 3.5 });
      svg(group, "text", { x: -7, y: LANE, dy: "0.32em", "text-anchor": "end" }, "inactive");
    }
    const hit = svg(group, "rect", { class: "hit", x: -REACH, y: TOP - 8, width: 2 * REACH, height: LANE - TOP + 18 });
    chart.brushShapes.set(index, svg(group, "rect", { class: "brush", x: -7, width: 14, y: 0, height: 0 }));
    drawBrush(chart, index);
    hit.addEventListener("pointerdown", (event) => startBrush(chart, index, hit, event));
    const name = svg(group, "g", { class: "name" });
    svg(name, "title", {}, axis.name);
    const rows = [...axis.label.map((text) => ["", text]), ...(axis.hint ? [["hint", axis.hint]] : [])];
    rows.forEach(([kind, text], row) => {
      svg(name, "text", { class: kind, y: TOP - 18 - 14 * (rows.length - 1 - row), "text-anchor": "middle" }, text);
    });
    name.addEventListener("pointerdown", (event) => startMove(chart, k, group, name, event));
  }

  function drawBrush(chart, index) {
    const [top, bottom] = chart.brushes.get(index) || [0, 0], shape = chart.brushShapes.get(index);
    shape.setAttribute("y", top);
    shape.setAttribute("height", bottom - top);
  }

  // Follows a pointer from its press to its release; ``moved`` and ``ended`` get its place in the drawing.
  function follow(chart, element, event, moved, ended) {
    if (event.button !== 0 || event.pointerType === "touch") return; // a finger scrolls
    event.preventDefault();
    element.setPointerCapture(event.pointerId);
    chart.dragging = true;
    hideLine(chart);
    const onMove = (e) => moved(position(chart, e));
    const onEnd = (e) => {
      element.removeEventListener("pointermove", onMove);
      chart.dragging = false;
      ended(position(chart, e));
    };
    element.addEventListener("pointermove", onMove);
    element.addEventListener("pointerup", onEnd, { once: true });
    element.addEventListener("pointercancel", onEnd, { once: true });
  }

  function startBrush(chart, index, hit, event) {
    const from = position(chart, event).y;
    const to = ({ y }) => {
      // Less than a few pixels is a click, which clears.
      if (Math.abs(y - from) < 4) chart.brushes.delete(index);
      else chart.brushes.set(index, [Math.min(from, y), Math.max(from, y)]);
      drawBrush(chart, index);
      drawLines(chart);
    };
    follow(chart, hit, event, to, to);
  }

  function startMove(chart, k, group, name, event) {
    const from = position(chart, event).x, shift = ({ x }) => chart.x[k] + x - from;
    follow(chart, name, event, (at) => group.setAttribute("transform", `translate(${shift(at)},0)`), (at) => {
      const others = chart.order.filter((_, i) => i !== k);
      const before = chart.x.filter((x, i) => i !== k && x < shift(at)).length;
      others.splice(before, 0, chart.order[k]);
      chart.order = others;
      draw(chart);
    });
  }

  const position = (chart, event) => {
    const box = chart.svg.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };

  // The selected line that passes nearest, within reach; distances are square to the line.
  function nearest(chart, { x, y }) {
    const last = chart.x.length - 1;
    if (x < chart.x[0] - REACH || x > chart.x[last] + REACH) return null;
    const right = chart.x.findIndex((at, i) => i > 0 && x <= at), k = right < 0 ? last : right;
    const along = Math.min(Math.max((x - chart.x[k - 1]) / (chart.x[k] - chart.x[k - 1]), 0), 1);
    let found = null, least = REACH;
    for (const line of chart.selected) {
      const a = yOf(line.places[chart.order[k - 1]]), b = yOf(line.places[chart.order[k]]);
      const slope = (b - a) / (chart.x[k] - chart.x[k - 1]);
      const distance = Math.abs(a + along * (b - a) - y) / Math.hypot(1, slope);
      if (distance < least || (distance === least && line.front)) [found, least] = [line, distance];
    }
    return found;
  }

  function showLine(chart, line, at) {
    if (chart.shown !== line) {
      chart.shown = line;
      chart.over.replaceChildren();
      chart.svg.classList.add("pointed");
      for (const kind of ["casing", "bright"]) {
        const group = svg(chart.over, "g", { class: kind });
        if (kind === "bright") group.setAttribute("stroke", colourOf(chart, line));
        for (const [style, d] of paths(chart, line)) svg(group, "path", { class: style, d });
      }
      chart.order.forEach((axis, k) => {
        svg(chart.over, "circle", { cx: chart.x[k], cy: yOf(line.places[axis]), r: 4, fill: colourOf(chart, line) });
      });
      fillTip(chart, line);
    }
    const tip = chart.tip, seen = chart.scroll.scrollLeft, room = chart.place.clientWidth - tip.offsetWidth;
    const side = at.x - seen + 18 > room ? at.x - seen - tip.offsetWidth - 18 : at.x - seen + 18;
    tip.style.left = `${Math.max(0, Math.min(side, room))}px`;
    tip.style.top = `${Math.max(0, Math.min(at.y - tip.offsetHeight / 2, LANE - tip.offsetHeight + 16))}px`;
  }

  function fillTip(chart, line) {
    const list = document.createElement("dl");
    for (const axis of chart.order) {
      for (const [tag, text] of [["dt", chart.data.axes[axis].name], ["dd", line.texts[axis] ?? "inactive"]]) {
        list.appendChild(document.createElement(tag)).textContent = text;
      }
    }
    const head = document.createElement("strong");
    head.textContent = line.trial + (line.front ? " ★" : "");
    chart.tip.replaceChildren(head, list);
    chart.tip.hidden = false;
  }

  function hideLine(chart) {
    chart.shown = null;
    chart.over.replaceChildren();
    chart.svg.classList.remove("pointed");
    chart.tip.hidden = true;
  }

  function draw(chart) {
    const count = chart.order.length, room = chart.scroll.clientWidth - LEFT - RIGHT;
    const spacing = Math.max(SPACING, room / (count - 1)), width = LEFT + RIGHT + spacing * (count - 1);
    chart.x = chart.order.map((_, k) => LEFT + spacing * k);
    chart.svg.setAttribute("width", width);
    chart.svg.setAttribute("viewBox", `0 0 ${width} ${LANE + 20}`);
    hideLine(chart);
    chart.axes.replaceChildren();
    chart.order.forEach((_, k) => drawAxis(chart, k));
    drawLines(chart);
  }

  function drawLegend(chart) {
    const { axis, goal } = chart.data.colours[chart.colour], [low, high] = chart.data.axes[axis].ends;
    const [worst, best] = goal === "maximize" ? [low, high] : [high, low];
    chart.place.querySelector("[data-worst]").textContent = worst;
    chart.place.querySelector("[data-best]").textContent = best;
    chart.place.querySelector("[data-ramp]").style.background = `linear-gradient(90deg,${SHADES.join(",")})`;
  }

  return function make(place, data) {
    const scroll = place.querySelector(".axes"), find = (name) => place.querySelector(`[data-${name}]`);
    const root = svg(scroll, "svg", { height: LANE + 20 });
    const [under, axes, over] = ["under", "axes", "over"].map((name) => svg(root, "g", { class: name }));
    const chart = {
      place, data, scroll, svg: root, under, axes, over, tip: find("tip"), status: find("status"), reset: find("reset"),
      order: data.axes.map((_, i) => i), brushes: new Map(), brushShapes: new Map(), colour: 0, frontOnly: false,
    };
    find("colour").addEventListener("change", (event) => {
      chart.colour = Number(event.target.value);
      drawLegend(chart);
      drawLines(chart);
    });
    find("only").addEventListener("change", (event) => {
      chart.frontOnly = event.target.checked;
      drawLines(chart);
    });
    chart.reset.addEventListener("click", () => {
      chart.brushes.clear();
      chart.brushShapes.forEach((_, index) => drawBrush(chart, index));
      drawLines(chart);
    });
    const point = (event) => {
      if (chart.dragging) return;
      const at = position(chart, event), line = nearest(chart, at);
      if (line) showLine(chart, line, at);
      else hideLine(chart);
    };
    root.addEventListener("pointermove", point);
    root.addEventListener("pointerdown", point);
    root.addEventListener("pointerleave", (event) => event.pointerType === "touch" || hideLine(chart));
    drawLegend(chart);
    draw(chart);
    let drawn = scroll.clientWidth;
    new ResizeObserver(() => {
      if (scroll.clientWidth !== drawn) draw(chart);
      drawn = scroll.clientWidth;
    }).observe(scroll);
  };
})();
