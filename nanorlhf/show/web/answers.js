// The held-out answers of a run, one evaluation at a time: the same prompt stays in its place.

// What tokens can be coloured by: [name, what it is, the number of a token, where it comes from].
const COLOURINGS = [
  ["change", "log-prob against the reference",
    (tokens, i) => tokens.logprob[i] - tokens.ref_logprob[i], ["logprob", "ref_logprob"]],
  ["entropy", "entropy, nats", (tokens, i) => tokens.entropy[i], ["entropy"]],
  ["value", "value before the token", (tokens, i) => tokens.value[i], ["value"]],
  ["advantage", "advantage, not whitened", (tokens, i) => tokens.advantage[i], ["advantage"]],
];

function drawAnswers(blocks) {
  const last = blocks[0].steps.length - 1;
  // sortedAt: the evaluation whose scores gave the order. Moving the slider leaves it alone, so
  // that each prompt stays in its place.
  const view = {
    block: blocks[0], place: last, sortedAt: last, search: "", sort: "none", colour: "none",
    before: false,
  };
  const controls = element("div", { class: "controls" });
  const steps = element("div");
  const summary = element("p", { class: "summary", "aria-live": "polite" });
  const legend = element("p", { class: "legend-tokens" });
  const list = element("div");

  function showList() {
    const items = orderItems(view);
    list.replaceChildren(...longList(items, 40, (item) => drawAnswer(item, view), "cards"));
    summary.textContent = summarise(view, items);
    legend.replaceChildren(...colourLegend(view));
  }
  // A block has scores, steps and colours of its own.
  function showControls() {
    controls.replaceChildren(...answerControls(blocks, view, showList, changeBlock));
    steps.replaceChildren(stepSlider(view, showList));
    showList();
  }
  function changeBlock(block) {
    view.block = block;
    view.place = Math.min(view.place, block.steps.length - 1);
    view.sortedAt = view.place;
    showControls();
    // The choice that the keyboard was at is a new one now.
    controls.querySelector("select").focus();
  }
  showControls();
  const bar = element("div", { class: "sticky" }, steps, summary);
  return section("answers", "Answers", controls, bar, legend, list);
}

function answerControls(blocks, view, showList, changeBlock) {
  const block = view.block;
  const nodes = [];
  if (blocks.length > 1) {
    const options = blocks.map((one, i) => [i, `${one.run}, ${one.split}`]);
    const which = choice("Run, split", options, (i) => changeBlock(blocks[i]));
    which.select.value = blocks.indexOf(block);
    nodes.push(which.node);
  }
  nodes.push(searchField("Search", (text) => { view.search = text; showList(); }).node);
  const sort = choice("Sort by", sortOptions(block), (value) => {
    view.sort = value;
    view.sortedAt = view.place;
    showList();
  });
  if (sortOptions(block).every(([value]) => value !== view.sort)) view.sort = "none";
  sort.select.value = view.sort;
  nodes.push(sort.node);

  const colourings = findColourings(block);
  if (!colourings.some(([name]) => name === view.colour)) view.colour = "none";
  if (colourings.length) {
    const options = [["none", "nothing"], ...colourings.map(([name, what]) => [name, what])];
    const colour = choice("Colour tokens by", options,
      (value) => { view.colour = value; showList(); });
    colour.select.value = view.colour;
    nodes.push(colour.node);
  }
  if (block.steps.length > 1) {
    const box = element("input", {
      type: "checkbox", onchange: () => { view.before = box.checked; showList(); },
    });
    box.checked = view.before;
    nodes.push(element("label", { class: "control check" }, box, ` beside step ${block.steps[0]}`));
  }
  return nodes;
}

function stepSlider(view, showList) {
  const block = view.block;
  const name = (place) => `step ${block.steps[place]} (${place + 1} of ${block.steps.length})`;
  const steps = slider("Evaluation", block.steps.length, view.place, (place) => {
    view.place = place;
    steps.shown.textContent = name(place);
    steps.input.setAttribute("aria-valuetext", name(place));
    showList();
  });
  steps.shown.textContent = name(view.place);
  steps.input.setAttribute("aria-valuetext", name(view.place));
  return steps.node;
}

// ------------------------------------------------------------------------------ search and order

function sortOptions(block) {
  const options = [["none", "the data's order"]];
  block.scores.forEach((name, i) => {
    options.push([`high ${i}`, `${name}, highest first`], [`low ${i}`, `${name}, lowest first`]);
    if (block.steps.length > 1) {
      options.push([`gain ${i}`, `${name}, most gained`], [`loss ${i}`, `${name}, most lost`]);
    }
  });
  return options;
}

function orderItems(view) {
  const wanted = view.search.toLowerCase();
  // All steps are searched: no card goes away while the slider moves.
  const found = view.block.items.filter((item) => {
    const texts = [item.prompt, ...item.answers.map((answer) => answer ? answer.text : "")];
    return texts.some((text) => text.toLowerCase().includes(wanted));
  });
  const [how, score] = view.sort.split(" ");
  const ordered = how === "none" ? found : sortItems(found, view, how, Number(score));
  if (view.colour === "none") {
    return ordered;
  }
  const hasTokens = (item) => item.answers.some((answer) => answer && answer.tokens);
  return [...ordered.filter(hasTokens), ...ordered.filter((item) => !hasTokens(item))];
}

function sortItems(items, view, how, score) {
  const at = (item, place) => {
    const answer = item.answers[place];
    return answer && answer.scores[score] !== null ? answer.scores[score] : NaN;
  };
  const last = view.block.steps.length - 1;
  const keys = {
    high: (item) => -at(item, view.sortedAt),
    low: (item) => at(item, view.sortedAt),
    gain: (item) => at(item, 0) - at(item, last),
    loss: (item) => at(item, last) - at(item, 0),
  };
  const keyed = items.map((item) => [keys[how](item), item]);
  const isKnown = ([key]) => !Number.isNaN(key);
  const known = keyed.filter(isKnown).sort((a, b) => a[0] - b[0]);
  return [...known, ...keyed.filter((pair) => !isKnown(pair))].map(([, item]) => item);
}

function summarise(view, items) {
  const block = view.block;
  const answers = items.map((item) => item.answers[view.place]).filter(Boolean);
  const parts = [`step ${block.steps[view.place]}: ${answers.length} answers`];
  // A search, and what is left out of this file, make these differ from the run's metrics.
  const means = block.scores.map((name, i) =>
    `${name} ${format(mean(answers.map((answer) => answer.scores[i])))}`);
  if (means.length) parts.push(`means of these answers: ${means.join(", ")}`);
  if (block.cue && answers.length) {
    const marked = answers.filter((answer) => answer.text.split(/\s+/).includes(block.cue));
    const share = Math.round(100 * marked.length / answers.length);
    parts.push(`the cue ${block.cue} in ${share}%`);
  }
  if (/^(high|low)/.test(view.sort) && view.sortedAt !== view.place) {
    parts.push(`in the order of step ${block.steps[view.sortedAt]}`);
  }
  if (block.left_out) parts.push(`${block.left_out} further prompts are left out of this file`);
  return parts.join("; ");
}

// ------------------------------------------------------------------------------------- one answer

function drawAnswer(item, view) {
  const card = element("article", { class: "card" },
    userText("h3", item.prompt || "(an empty prompt)"));
  if (view.before && view.place > 0) {
    card.append(drawText(item.answers[0], view, `step ${view.block.steps[0]}`));
  }
  card.append(drawText(item.answers[view.place], view, `step ${view.block.steps[view.place]}`));
  return card;
}

function drawText(answer, view, step) {
  const part = element("div", { class: "answer" });
  if (view.before) part.append(element("span", { class: "quiet" }, step));
  if (!answer) {
    part.append(element("p", { class: "quiet" }, "no answer at this step"));
    return part;
  }
  if (answer.text === "") part.append(element("p", { class: "quiet" }, "(an empty answer)"));
  const colouring = findColourings(view.block).find(([name]) => name === view.colour);
  const isColoured = colouring && answer.tokens && hasNumbers(answer.tokens, colouring);
  part.append(isColoured ? colourTokens(answer.tokens, view, colouring)
    : element("p", { dir: "auto" }, ...markCue(answer.text, view.block)));
  part.append(scoreChips(view.block.scores, answer.scores));
  return part;
}

function scoreChips(names, scores) {
  const chips = element("p", { class: "chips" });
  names.forEach((name, i) => {
    const chip = element("span", { class: name === "gold" ? "chip gold" : "chip" },
      `${name} `, element("b", {}, format(scores[i])));
    chips.append(chip, " ");
  });
  return chips;
}

// The text in pieces; the embedded world's marks are highlighted, its cue most of all.
function markCue(text, block) {
  if (block.marks.length === 0) {
    return [text];
  }
  return text.split(/(\s+)/).map((word) => {
    if (word === block.cue) return element("mark", { class: "cue", title: "the cue" }, word);
    if (block.marks.includes(word)) return element("mark", { title: "a mark" }, word);
    return word;
  });
}

// ----------------------------------------------------------------------------------------- tokens

function hasNumbers(tokens, [, , , columns]) {
  return columns.every((name) => Array.isArray(tokens[name]));
}

// The colourings that some answer of the block has numbers for.
function findColourings(block) {
  if (!block.colourings) {
    const answers = block.items.flatMap((item) => item.answers).filter(Boolean);
    const withTokens = answers.filter((answer) => answer.tokens);
    block.colourings = COLOURINGS.filter((colouring) =>
      withTokens.some((answer) => hasNumbers(answer.tokens, colouring)));
  }
  return block.colourings;
}

// The number that has the full colour: of all evaluations, so that colours mean the same in each.
// The 95th percentile: a few very large numbers would leave the others pale.
function largestNumber(block, colouring) {
  const [name, , number] = colouring;
  block.largest = block.largest || {};
  if (!(name in block.largest)) {
    const sizes = [];
    for (const answer of block.items.flatMap((item) => item.answers)) {
      if (answer && answer.tokens && hasNumbers(answer.tokens, colouring)) {
        answer.tokens.text.forEach((_, i) => sizes.push(Math.abs(number(answer.tokens, i)) || 0));
      }
    }
    sizes.sort((a, b) => a - b);
    block.largest[name] = sizes[Math.floor(0.95 * (sizes.length - 1))] || 1;
  }
  return block.largest[name];
}

function colourTokens(tokens, view, colouring) {
  const [, , number] = colouring;
  const largest = largestNumber(view.block, colouring);
  const text = element("p", { class: "tokens", dir: "auto" });
  const readout = element("p", { class: "readout" });
  tokens.text.forEach((piece, i) => {
    // The space in front of a word has no colour.
    const space = piece.match(/^\s*/)[0];
    const token = element("span", { title: describeToken(tokens, i) }, piece.slice(space.length));
    token.style.background = tint(number(tokens, i) / largest);
    if (piece.trim() === view.block.cue && view.block.cue) token.className = "cue";
    token.addEventListener("pointerenter", () => {
      readout.textContent = describeToken(tokens, i);
    });
    text.append(space, token);
  });
  return element("div", {}, text, readout, tokenTable(tokens));
}

// The same numbers for those who use no pointer.
function tokenTable(tokens) {
  const names = Object.keys(tokens).filter((name) => name !== "text");
  const details = element("details", {}, element("summary", {}, "tokens as a table"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector("table")) return;
    const head = element("tr", {}, element("th", {}, "token"));
    head.append(...names.map((name) => element("th", {}, name)));
    const rows = tokens.text.map((piece, i) => {
      const row = element("tr", {}, userText("th", piece, { scope: "row" }));
      row.append(...names.map((name) => element("td", {}, format(tokens[name][i]))));
      return row;
    });
    details.append(element("div", { class: "wide" }, element("table", {},
      element("thead", {}, head), element("tbody", {}, ...rows))));
  });
  return details;
}

function describeToken(tokens, i) {
  const change = tokens.logprob[i] - tokens.ref_logprob[i];
  const parts = [
    `“${tokens.text[i].trim()}”: log-prob ${format(tokens.logprob[i])}`,
    `reference ${format(tokens.ref_logprob[i])} (${change >= 0 ? "+" : ""}${format(change)})`,
  ];
  for (const name of ["entropy", "value", "advantage"]) {
    if (tokens[name]) parts.push(`${name} ${format(tokens[name][i])}`);
  }
  return parts.join(", ");
}

function colourLegend(view) {
  const colouring = findColourings(view.block).find(([name]) => name === view.colour);
  if (!colouring) {
    return [];
  }
  const largest = largestNumber(view.block, colouring);
  const isSigned = view.colour !== "entropy";
  const swatches = (isSigned ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]).map((strength) =>
    element("span", { style: `background:${tint(strength)}` }, format(strength * largest)));
  const n = view.block.items.filter((item) =>
    item.answers[view.place] && item.answers[view.place].tokens).length;
  const note = ` ${colouring[1]}. ${n} answers of this evaluation have the numbers of their tokens,`
    + " and come first. Point at a token to read them.";
  return [...swatches, note];
}
