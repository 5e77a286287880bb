// Small things that all sections use: elements, numbers as text, colours.

const SVG = "http://www.w3.org/2000/svg";

// An element with attributes ("onclick" and the like are listeners) and children. Children that are
// strings become text: nothing of the data is ever read as markup.
function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

// The same for the parts of a picture.
function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) {
      node.addEventListener(name.slice(2), value);
    } else if (value === true) {
      node.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, value);
    }
  }
  node.append(...children);
  return node;
}

// A text of the data. Its own letters say whether it runs from right to left.
function userText(tag, text, attributes = {}) {
  return element(tag, { dir: "auto", ...attributes }, text);
}

// A number for reading: short, but a small one keeps two digits; "–" where there is none.
function format(number) {
  if (number === null || number === undefined || Number.isNaN(number)) {
    return "–";
  }
  if (Number.isInteger(number)) {
    return String(number).replace("-", "−");
  }
  return shorten(number).replaceAll("-", "−");
}

function shorten(number) {
  const size = Math.abs(number);
  if (size >= 100) return number.toFixed(0);
  if (size >= 10) return number.toFixed(1);
  if (size >= 0.1) return number.toFixed(2);
  if (size >= 0.001) return number.toFixed(3);
  return number.toPrecision(2);
}

// The least and the largest of any number of numbers: Math.min(...numbers) takes only so many.
function lowest(numbers) {
  return numbers.reduce((a, b) => Math.min(a, b), Infinity);
}

function highest(numbers) {
  return numbers.reduce((a, b) => Math.max(a, b), -Infinity);
}

function mean(numbers) {
  const known = numbers.filter((number) => number !== null && number !== undefined);
  if (known.length === 0) {
    return null;
  }
  return known.reduce((sum, number) => sum + number, 0) / known.length;
}

// The colours of page.css: one is gold's alone, the other seven are for all else, i = 0, 1, ...
const GOLD = "var(--series-0)";

function seriesColour(i) {
  return `var(--series-${1 + i % 7})`;
}

// The background of a token. strength: -1 to 1; below 0 is the other colour.
function tint(strength) {
  const bounded = Math.max(-1, Math.min(1, strength));
  const hue = bounded < 0 ? "--low" : "--high";
  return `rgb(var(${hue}) / calc(var(--strongest) * ${Math.abs(bounded).toFixed(3)}))`;
}

// A labelled choice. options: [value, what is shown]; change(value) is called with the chosen one.
function choice(label, options, change) {
  const select = element("select", { onchange: () => change(select.value) });
  for (const [value, shown] of options) {
    select.append(element("option", { value }, shown));
  }
  const wrapped = element("label", { class: "control" }, element("span", {}, label), select);
  return { node: wrapped, select };
}

// A labelled slider over the places 0 ... n - 1, with what it stands at.
function slider(label, n, start, change) {
  const shown = element("output", {});
  const input = element("input", {
    type: "range", min: 0, max: Math.max(n - 1, 0), step: 1, value: start, disabled: n < 2,
    oninput: () => change(Number(input.value)),
  });
  const head = element("span", {}, label, " ", shown);
  return { node: element("label", { class: "control slider" }, head, input), input, shown };
}

function searchField(label, change) {
  const input = element("input", { type: "search", oninput: () => change(input.value) });
  return { node: element("label", { class: "control" }, element("span", {}, label), input), input };
}

// A list that shows `step` items at first, and more when asked. make(item) draws one of them.
function longList(items, step, make, className) {
  const list = element("div", { class: className });
  const more = element("button", { type: "button", class: "more", onclick: () => grow() });
  let shown = 0;
  function grow() {
    list.append(...items.slice(shown, shown + step).map(make));
    shown = Math.min(shown + step, items.length);
    more.hidden = shown >= items.length;
    more.textContent = `Show more (${items.length - shown} left)`;
  }
  grow();
  return [list, more];
}

function section(id, title, ...children) {
  return element("section", { id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title` }, title), ...children);
}
