// Best-of-n: which of the first n answers each reward and each objective takes, and its gold.

function drawBestOfN(blocks) {
  const view = { block: blocks[0], place: blocks[0].ns.length - 1, search: "" };
  const controls = element("div", { class: "controls" });
  const bar = element("div", { class: "sticky" });
  const table = element("div", { class: "forests" });
  const summary = element("p", { class: "summary", "aria-live": "polite" });
  const list = element("div");

  function show() {
    const wanted = view.search.toLowerCase();
    const items = view.block.items.filter((item) =>
      [item.prompt, ...item.answers.map((answer) => answer.text)].some((text) =>
        text.toLowerCase().includes(wanted)));
    table.replaceChildren(...bestTables(view, items).map(drawForest));
    summary.textContent = describePool(view, items);
    list.replaceChildren(...longList(items, 20, (item) => drawChoice(item, view), "cards"));
  }
  function showControls() {
    controls.replaceChildren(...bestControls(blocks, view, show, changeBlock));
    bar.replaceChildren(numberSlider(view, show), summary);
    show();
  }
  function changeBlock(block) {
    view.block = block;
    view.place = Math.min(view.place, block.ns.length - 1);
    showControls();
    // The choice that the keyboard was at is a new one now.
    controls.querySelector("select").focus();
  }
  showControls();
  const note = "Each takes the best of the first n answers in the pool: one draw. "
    + "The curve above is the mean over all draws.";
  return section("best-of-n", "Best of n", element("p", { class: "quiet" }, note), controls, bar,
    table, list);
}

function bestControls(blocks, view, show, changeBlock) {
  const nodes = [];
  const block = view.block;
  if (blocks.length > 1) {
    const options = blocks.map((one, i) => [i, one.run]);
    const which = choice("Run", options, (i) => changeBlock(blocks[i]));
    which.select.value = blocks.indexOf(block);
    nodes.push(which.node);
  }
  nodes.push(searchField("Search", (text) => { view.search = text; show(); }).node);
  return nodes;
}

function numberSlider(view, show) {
  const block = view.block;
  const ns = slider("The best of", block.ns.length, view.place, (place) => {
    view.place = place;
    ns.shown.textContent = `n = ${block.ns[place]}`;
    ns.input.setAttribute("aria-valuetext", `n = ${block.ns[place]}`);
    show();
  });
  ns.shown.textContent = `n = ${block.ns[view.place]}`;
  return ns.node;
}

function describePool(view, items) {
  const left = view.block.left_out;
  const note = left ? `; ${left} further prompts are left out of this file` : "";
  return `the best of ${view.block.ns[view.place]} to ${items.length} prompts${note}`;
}

// What each reward and objective gets at this n: means over the prompts and their standard errors.
function bestTables(view, items) {
  const { proxies, scores } = view.block;
  const gold = scores.indexOf("gold");
  const ending = ", ± 1 standard error";
  const own = { name: `its own score of what it takes${ending}`, reference: 0, rows: [] };
  const truth = { name: `gold of what it takes${ending}`, reference: 0, rows: [] };
  for (const proxy of proxies) {
    const place = (item) => item.picks[proxy][view.place];
    own.rows.push(meanRow(proxy, items.map((item) => item.proxy_scores[proxy][view.place])));
    truth.rows.push(meanRow(proxy, items.map((item) => item.answers[place(item)].scores[gold])));
  }
  return gold >= 0 ? [truth, own] : [own];
}

function meanRow(label, values) {
  const numbers = values.filter((value) => value !== null && value !== undefined);
  const centre = mean(numbers);
  if (numbers.length < 2) {
    return [label, centre, null, null];
  }
  const squares = numbers.map((number) => (number - centre) ** 2);
  const error = Math.sqrt(mean(squares) / (numbers.length - 1));
  return [label, centre, centre - error, centre + error];
}

// A prompt, and the answers that somebody takes, those that most take first.
function drawChoice(item, view) {
  const block = view.block;
  const takers = new Map();
  for (const proxy of block.proxies) {
    const place = item.picks[proxy][view.place];
    takers.set(place, [...(takers.get(place) || []), proxy]);
  }
  const card = element("article", { class: "card" }, userText("h3", item.prompt));
  const byNumber = [...takers].sort((a, b) => b[1].length - a[1].length);
  for (const [place, names] of byNumber) {
    const answer = item.answers[place];
    const chips = names.map((name) => element("span", { class: "chip taker" }, name));
    card.append(element("div", { class: "answer" },
      element("p", { class: "chips" }, ...chips.flatMap((chip) => [chip, " "]),
        element("span", { class: "quiet" }, `answer ${answer.place + 1}`)),
      userText("p", answer.text), scoreChips(block.scores, answer.scores)));
  }
  return card;
}
