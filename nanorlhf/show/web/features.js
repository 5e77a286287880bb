// Features of autoencoders: a card for each, two autoencoders beside each other.

const FEATURE_ORDERS = {
  "none": ["rate x strength", null],
  "rate": ["how often it fires", (feature) => -feature.rate],
  "mean": ["mean where it fires", (feature) => -feature.mean],
  "max": ["its largest value", (feature) => -feature.max],
  "weight": ["weight in the reward", (feature) => -Math.abs(feature.weight)],
  "id": ["its number", (feature) => feature.id],
};

function drawFeatures(blocks) {
  // Base beside policy, where both have been described.
  const policy = blocks.findIndex((block) => /(^|\/)policy(\/|$)/.test(block.name));
  const first = Math.max(0, policy);
  const base = blocks.findIndex((block) =>
    block.name === blocks[first].name.replace(/(^|\/)policy(\/|$)/, "$1base$2"));
  const view = { left: blocks[first], right: null, search: "", sort: "none" };
  if (base >= 0 && base !== first) {
    view.left = blocks[base];
    view.right = blocks[first];
  }
  const columns = element("div", { class: "columns" });
  function show() {
    const shown = [view.left, view.right].filter(Boolean);
    columns.replaceChildren(...shown.map((block) => featureColumn(block, view)));
    columns.classList.toggle("two", shown.length === 2);
  }
  const controls = element("div", { class: "controls" },
    ...featureControls(blocks, view, show));
  show();
  return section("features", "Features", controls, columns);
}

function featureControls(blocks, view, show) {
  const options = blocks.map((block, i) => [i, block.name]);
  const left = choice("Autoencoder", options, (i) => { view.left = blocks[i]; show(); });
  left.select.value = blocks.indexOf(view.left);
  const right = choice("beside", [[-1, "nothing"], ...options], (i) => {
    view.right = blocks[i] || null;
    show();
  });
  right.select.value = view.right ? blocks.indexOf(view.right) : -1;
  const known = Object.entries(FEATURE_ORDERS).filter(([name]) =>
    name === "none" || blocks.some((block) => block.items.some((item) => name in item)));
  const sort = choice("Sort by", known.map(([name, [what]]) => [name, what]),
    (value) => { view.sort = value; show(); });
  const search = searchField("Filter", (text) => { view.search = text; show(); });
  const nodes = [left.node, search.node, sort.node];
  if (blocks.length > 1) nodes.splice(1, 0, right.node);
  return nodes;
}

function featureColumn(block, view) {
  const wanted = view.search.toLowerCase().trim();
  let items = block.items.filter((feature) => featureText(feature).includes(wanted));
  const [, key] = FEATURE_ORDERS[view.sort];
  if (key) items = [...items].sort((a, b) => (key(a) || 0) - (key(b) || 0));
  const left = block.left_out ? `, ${block.left_out} left out of this file` : "";
  const head = element("p", { class: "summary" }, element("b", {}, block.name),
    ` ${block.place}: ${items.length} of ${block.items.length} features${left}`);
  return element("div", { class: "column" }, head, ...longList(items, 20, drawFeature, "cards"));
}

// All that the filter looks at.
function featureText(feature) {
  const tokens = ["tokens", "up", "down"].flatMap((name) => feature[name] || []);
  const words = [`#${feature.id}`, feature.description || "", ...tokens.map(([token]) => token)];
  return words.join(" ").toLowerCase();
}

function drawFeature(feature) {
  const card = element("article", { class: "card feature" },
    element("h3", {}, `#${feature.id}`), featureNumbers(feature));
  if (feature.description) {
    card.append(element("p", { class: "description", dir: "auto" }, feature.description));
  }
  if (feature.histogram && feature.histogram.counts.length) {
    card.append(drawHistogram(feature.histogram));
  }
  const lists = element("dl");
  for (const [name, what] of [["tokens", "fires on"], ["up", "raises"], ["down", "lowers"]]) {
    if (feature[name] && feature[name].length) {
      lists.append(element("dt", {}, what), tokenList(feature[name]));
    }
  }
  card.append(lists);
  for (const context of feature.contexts || []) {
    card.append(drawContext(context));
  }
  return card;
}

function featureNumbers(feature) {
  const chips = element("p", { class: "chips" });
  const numbers = [
    ["fires on", feature.rate === undefined ? null : `${format(100 * feature.rate)}%`],
    ["mean", feature.mean], ["largest", feature.max], ["weight", feature.weight],
  ];
  for (const [name, value] of numbers) {
    if (value !== null && value !== undefined) {
      const shown = typeof value === "string" ? value : format(value);
      chips.append(element("span", { class: "chip" }, `${name} `, element("b", {}, shown)), " ");
    }
  }
  return chips;
}

function tokenList(rows) {
  const list = element("dd", {});
  for (const [token, number] of rows) {
    list.append(userText("span", token.trim() || "␣",
      { class: "token", title: format(number) }), " ");
  }
  return list;
}

// How often the feature has which value; the heights are square roots, so that rare ones are seen.
function drawHistogram(histogram) {
  const { low, high, counts } = histogram;
  const largest = Math.sqrt(highest(counts));
  const width = 200 / counts.length;
  const svg = shape("svg", {
    viewBox: "0 0 200 40", class: "histogram", role: "img", preserveAspectRatio: "none",
    "aria-label": `values from ${format(low)} to ${format(high)}`,
  }, shape("title", {}, `values from ${format(low)} to ${format(high)}; heights are square roots`));
  counts.forEach((count, i) => {
    const height = largest ? 38 * Math.sqrt(count) / largest : 0;
    svg.append(shape("rect", {
      x: i * width + 0.5, y: 40 - height, width: width - 1, height,
    }));
  });
  const ends = element("p", { class: "ends" }, element("span", {}, format(low)),
    element("span", {}, format(high)));
  return element("div", {}, svg, ends);
}

// A text in which the feature is large; the colour of a token says how large.
function drawContext(context) {
  const text = element("p", { class: "tokens context", dir: "auto" });
  if (context.side) text.append(element("span", { class: "quiet" }, `${context.side}: `));
  const strongest = Math.max(highest(context.values.map(Math.abs)), 1e-9);
  const isShare = strongest <= 1.0001;
  // The tokens of word-level tokenizers carry no spaces.
  const carriesSpaces = context.tokens.some((token) => /^\s/.test(token));
  context.tokens.forEach((token, i) => {
    const value = context.values[i];
    const piece = element("span", { title: format(value) }, token);
    if (value) piece.style.background = tint(isShare ? value : value / strongest);
    text.append(piece, carriesSpaces ? "" : " ");
  });
  return text;
}
