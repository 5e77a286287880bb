// Charts: lines with bands over one x, as pictures that a mouse, a finger or arrow keys can read.

const CHART = { width: 420, height: 250, left: 46, right: 12, top: 10, bottom: 34 };
const DASHES = ["", "6 4", "2 3", "9 3 2 3"];

function drawCurves(data) {
  const names = unique(data.panels.flatMap((panel) => panel.lines.map((line) => line.series)));
  const hidden = new Set();
  const grid = element("div", { class: "charts" });
  function redraw() {
    grid.replaceChildren(...data.panels.map((panel) => drawPanel(panel, names, hidden)));
  }
  redraw();
  if (names.length < 2) {
    return section("curves", "Curves", grid);
  }
  const buttons = names.map((name, i) => seriesButton(name, i, hidden, redraw));
  const legend = element("div", { class: "legend", role: "group", "aria-label": "Lines" });
  legend.append(...buttons);
  return section("curves", "Curves", legend, grid);
}

// Switches the lines of one run, reward or autoencoder off and on.
function seriesButton(name, i, hidden, redraw) {
  const swatch = element("span", { class: "swatch", style: `background:${seriesColour(i)}` });
  const button = element("button", { type: "button", "aria-pressed": "true" }, swatch, name);
  button.addEventListener("click", () => {
    const isHidden = hidden.has(name);
    if (isHidden) {
      hidden.delete(name);
    } else {
      hidden.add(name);
    }
    button.setAttribute("aria-pressed", String(isHidden));
    redraw();
  });
  return button;
}

function drawPanel(panel, names, hidden) {
  const shown = panel.lines.filter((line) => line.points.length && !hidden.has(line.series));
  const lines = styleLines(panel, shown, names);
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  const caption = element("figcaption", {}, panel.title);
  if (lines.some(hasBand)) caption.append(element("span", { class: "quiet" }, `, ${panel.band}`));
  const figure = element("figure", { class: "chart" }, caption);
  figure.append(panelLegend(lines));
  if (lines.length === 0) {
    figure.append(element("p", { class: "quiet" }, "no line is switched on"));
    return figure;
  }
  const scales = findScales(panel, lines);
  const svg = shape("svg", {
    viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", tabindex: 0,
    "aria-label": `${panel.title}: ${describe(lines)}. Arrow keys read its numbers.`,
  });
  svg.append(...drawAxes(panel, scales));
  for (const line of lines) {
    svg.append(...drawLine(line, scales));
  }
  addCursor(svg, panel, lines, scales, readout);
  figure.append(svg, readout);
  return figure;
}

// With several series colour tells them apart, and dashes what is drawn. With one, colour and
// dashes both tell what is drawn; the colour of gold is gold's alone.
function styleLines(panel, lines, names) {
  const series = unique(panel.lines.map((line) => line.series));
  const whats = unique(panel.lines.map((line) => line.what));
  return lines.map((line) => {
    const place = whats.indexOf(line.what);
    const others = whats.filter((what) => what !== "gold");
    let colour = seriesColour(names.indexOf(line.series));
    if (series.length === 1) {
      colour = line.what === "gold" ? GOLD : seriesColour(others.indexOf(line.what));
    }
    const labels = [];
    if (series.length > 1) labels.push(line.series);
    if (whats.length > 1) labels.push(line.what);
    return { ...line, colour, dash: DASHES[place % 4], label: labels.join(" ") };
  });
}

// What the dashes of a panel mean; the colours of several series stand above all panels.
function panelLegend(lines) {
  const legend = element("div", { class: "key" });
  const whats = unique(lines.map((line) => line.what));
  const isOneSeries = unique(lines.map((line) => line.series)).length === 1;
  if (whats.length < 2) {
    return legend;
  }
  for (const what of whats) {
    const line = lines.find((one) => one.what === what);
    const stroke = isOneSeries ? line.colour : "currentColor";
    const sample = shape("svg", { viewBox: "0 0 26 8", class: "sample", "aria-hidden": "true" },
      shape("line", { x1: 0, y1: 4, x2: 26, y2: 4, stroke, "stroke-dasharray": line.dash }));
    legend.append(element("span", {}, sample, what));
  }
  return legend;
}

function describe(lines) {
  return lines.map((line) => {
    const first = line.points[0];
    const last = line.points[line.points.length - 1];
    return `${line.label} from ${format(first[1])} to ${format(last[1])}`;
  }).join("; ");
}

// ------------------------------------------------------------------------------- scales and axes

function findScales(panel, lines) {
  const points = lines.flatMap((line) => line.points);
  const xs = points.map((point) => panel.log ? Math.log2(point[0]) : point[0]);
  const ys = points.flatMap((point) => [point[1], point[2] ?? point[1], point[3] ?? point[1]]);
  const x = niceRange(lowest(xs), highest(xs), panel.log ? 1 : 0);
  const y = niceRange(lowest(ys), highest(ys), 0);
  // Lines go from one side to the other: x is not rounded.
  x.low = lowest(xs);
  x.high = highest(xs);
  if (x.low === x.high) {
    x.low -= 0.5;
    x.high += 0.5;
  }
  const width = CHART.width - CHART.left - CHART.right;
  const height = CHART.height - CHART.top - CHART.bottom;
  const position = (value) => panel.log ? Math.log2(value) : value;
  return {
    xTicks: x.ticks.filter((tick) => tick >= x.low && tick <= x.high),
    yTicks: y.ticks,
    decimals: y.decimals,
    x: (value) => CHART.left + width * (position(value) - x.low) / (x.high - x.low),
    y: (value) => CHART.top + height * (1 - (value - y.low) / (y.high - y.low)),
  };
}

// A range that holds two numbers, with about five round ticks. smallest: the least step of a tick.
function niceRange(low, high, smallest) {
  // Numbers that differ only by the error of a sum count as one: no tick can stand between them.
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
    // One number has room on both sides; 0 is often the least there can be.
    low -= 0.5 * Math.abs(low);
    high += 0.5 * (Math.abs(high) || 1);
  }
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(smallest, power * [1, 2, 5, 10].find((k) => k * power >= rough));
  const ticks = [];
  // A line may go over the edge by a hair: -0.001 needs no tick at -50.
  const last = Math.ceil(high / step - 0.05);
  for (let i = Math.floor(low / step + 0.05); i <= last; i += 1) {
    // Not by adding up: 0.1 + 0.2 is not 0.3.
    ticks.push(Number((i * step).toPrecision(10)));
  }
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return { low: ticks[0], high: ticks[ticks.length - 1], ticks, decimals };
}

function drawAxes(panel, scales) {
  const bottom = CHART.height - CHART.bottom;
  const right = CHART.width - CHART.right;
  const parts = [];
  for (const tick of scales.yTicks) {
    const y = scales.y(tick);
    const kind = tick === 0 ? "grid zero" : "grid";
    parts.push(shape("line", { class: kind, x1: CHART.left, x2: right, y1: y, y2: y }));
    parts.push(shape("text", { class: "tick", x: CHART.left - 6, y: y + 4, "text-anchor": "end" },
      tick.toFixed(scales.decimals).replace("-", "−")));
  }
  for (const tick of scales.xTicks) {
    const value = panel.log ? 2 ** tick : tick;
    parts.push(shape("text", {
      class: "tick", x: scales.x(value), y: bottom + 15, "text-anchor": "middle",
    }, format(value)));
  }
  parts.push(shape("text", {
    class: "axis", x: (CHART.left + right) / 2, y: CHART.height - 4, "text-anchor": "middle",
  }, panel.x));
  return parts;
}

// ------------------------------------------------------------------------------ lines and cursor

function drawLine(line, scales) {
  const at = (point, i) => `${scales.x(point[0]).toFixed(1)},${scales.y(point[i]).toFixed(1)}`;
  const parts = [];
  const banded = line.points.filter(hasEnds);
  if (banded.length > 1) {
    const upper = banded.map((point) => at(point, 3));
    const lower = banded.map((point) => at(point, 2)).reverse();
    parts.push(shape("polygon", {
      class: "band", points: [...upper, ...lower].join(" "), fill: line.colour,
    }));
  }
  parts.push(shape("polyline", {
    class: "line", points: line.points.map((point) => at(point, 1)).join(" "),
    stroke: line.colour, "stroke-dasharray": line.dash,
  }));
  if (line.points.length < 25) {
    for (const point of line.points) {
      parts.push(shape("circle", {
        cx: scales.x(point[0]), cy: scales.y(point[1]), r: 2.4, fill: line.colour,
      }));
    }
  }
  return parts;
}

function hasEnds([, , low, high]) {
  return low !== null && high !== null;
}

function hasBand(line) {
  return line.points.some(hasEnds);
}

// A vertical line at one x, and the numbers there, where the pointer is or the arrow keys lead.
function addCursor(svg, panel, lines, scales, readout) {
  const xs = unique(lines.flatMap((line) => line.points.map((point) => point[0])));
  xs.sort((a, b) => a - b);
  const bottom = CHART.height - CHART.bottom;
  const cursor = shape("line", {
    class: "cursor", y1: CHART.top, y2: bottom, visibility: "hidden",
  });
  svg.append(cursor);
  let place = xs.length - 1;

  function show(i) {
    place = Math.max(0, Math.min(xs.length - 1, i));
    const x = scales.x(xs[place]);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    readout.textContent = `${panel.x} ${format(xs[place])}: ${readNumbers(lines, xs[place])}`;
  }

  function showNearest(event) {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * CHART.width / box.width;
    const distances = xs.map((value) => Math.abs(scales.x(value) - x));
    show(distances.indexOf(lowest(distances)));
  }

  svg.addEventListener("pointermove", showNearest);
  svg.addEventListener("pointerdown", showNearest);
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key in steps) {
      event.preventDefault();
      show(place + steps[event.key]);
    }
  });
  // At first the last point, so that nobody needs a mouse to read how it ended.
  readout.textContent = `${panel.x} ${format(xs[place])}: ${readNumbers(lines, xs[place])}`;
}

function readNumbers(lines, x) {
  const parts = [];
  for (const line of lines) {
    const point = line.points.find((one) => one[0] === x);
    if (point) {
      parts.push(`${line.label} ${format(point[1])}${formatError(point)}`.trim());
    }
  }
  return parts.join(", ");
}

// The end of a band: "± 0.1" where both sides are alike, else "(0.9 to 1.3)".
function formatError(point) {
  if (!hasEnds(point)) {
    return "";
  }
  const [, value, low, high] = point;
  const isEven = Math.abs((high - value) - (value - low)) < 0.02 * (high - low + 1e-12);
  return isEven ? ` ± ${format(high - value)}` : ` (${format(low)} to ${format(high)})`;
}

function unique(values) {
  return [...new Set(values)];
}
