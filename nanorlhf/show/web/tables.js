// Tables with their intervals as pictures.

function drawTables(tables) {
  const parts = tables.map((table) => element("details", { open: true, class: "results" },
    element("summary", {}, table.title),
    element("div", { class: "forests" }, ...table.metrics.map(drawForest))));
  return section("tables", "Numbers", ...parts);
}

// One metric: a row for each of its numbers, and the intervals on one scale.
function drawForest(metric) {
  const ends = metric.rows.flatMap(([, value, low, high]) => [value, low ?? value, high ?? value]);
  const known = [...ends.filter((number) => number !== null), metric.reference];
  const range = niceRange(lowest(known), highest(known), 0);
  const x = (value) => 4 + 192 * (value - range.low) / (range.high - range.low);
  const body = element("tbody");
  metric.rows.forEach(([label, value, low, high]) => {
    const interval = low === null || low === undefined ? ""
      : ` ${format(low)} to ${format(high)}`;
    body.append(element("tr", {}, userText("th", label, { scope: "row" }),
      element("td", {}, format(value)), element("td", { class: "quiet" }, interval),
      element("td", {}, drawInterval(x, value, low, high, metric.reference))));
  });
  const scale = element("p", { class: "ends" }, element("span", {}, format(range.low)),
    element("span", {}, format(range.high)));
  body.append(element("tr", {}, element("td"), element("td"), element("td"),
    element("td", {}, scale)));
  return element("div", { class: "wide" }, element("table", { class: "forest" },
    element("caption", {}, metric.name), body));
}

function drawInterval(x, value, low, high, reference) {
  const svg = shape("svg", { viewBox: "0 0 200 16", class: "interval", "aria-hidden": "true" });
  svg.append(shape("line", { class: "zero", x1: x(reference), x2: x(reference), y1: 0, y2: 16 }));
  if (value === null) {
    return svg;
  }
  if (low !== null && low !== undefined) {
    svg.append(shape("line", { class: "whisker", x1: x(low), x2: x(high), y1: 8, y2: 8 }));
  } else {
    svg.append(shape("line", { class: "bar", x1: x(reference), x2: x(value), y1: 8, y2: 8 }));
  }
  svg.append(shape("circle", { cx: x(value), cy: 8, r: 4 }));
  return svg;
}
