// The page: reads its data, draws the sections that there is data for, and listens to the keys.

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const sections = [];
  const notes = data.runs.filter((run) => run.note);
  const main = document.getElementById("main");
  for (const run of notes) {
    main.append(element("p", { class: "note" }, `${run.folder}: ${run.note}`));
  }

  const drawers = [
    ["curves", "Curves", data.panels, () => drawCurves(data)],
    ["answers", "Answers", data.answers, drawAnswers],
    ["best-of-n", "Best of n", data.best_of_n, drawBestOfN],
    ["features", "Features", data.features, drawFeatures],
    ["tables", "Numbers", data.tables, drawTables],
    ["settings", "Settings", data.settings, () => drawSettings(data)],
  ];
  for (const [id, title, content, draw] of drawers) {
    if (content.length) sections.push(drawOrSay(id, title, content, draw));
  }
  main.append(...sections);
  if (sections.length === 0) {
    main.append(element("p", {}, "There is nothing to see in these runs yet."));
  }
  const links = sections.map((one) =>
    element("a", { href: `#${one.id}` }, one.querySelector("h2").textContent));
  document.getElementById("sections").append(...links);

  setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
  document.getElementById("theme").addEventListener("click", switchTheme);
  document.addEventListener("keydown", listenToKeys);
}

// A section; where it cannot be drawn, a sentence that says so, and the others are drawn.
function drawOrSay(id, title, content, draw) {
  try {
    return draw(content);
  } catch (error) {
    return section(id, title,
      element("p", { class: "note" }, `This section could not be drawn (${error.message}).`));
  }
}

function drawSettings(data) {
  const several = data.runs.length > 1;
  const head = element("tr", {}, element("th", { scope: "col" }, "setting"));
  head.append(...data.runs.map((run) => element("th", { scope: "col" }, run.name)));
  const body = element("tbody");
  for (const [name, values] of data.settings) {
    const differs = several && new Set(values).size > 1;
    const row = element("tr", { class: differs ? "differs" : null },
      element("th", { scope: "row" }, name));
    row.append(...values.map((value) => userText("td", value)));
    body.append(row);
  }
  const title = several ? "All settings; those that differ come first" : "All settings";
  const table = element("div", { class: "wide" },
    element("table", { class: "settings" }, element("thead", {}, head), body));
  return section("settings", "Settings",
    element("details", { open: several }, element("summary", {}, title), table));
}

// ------------------------------------------------------------------------------- theme and keys

function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  document.getElementById("theme").textContent = isDark ? "Light" : "Dark";
}

function switchTheme() {
  setTheme(document.documentElement.dataset.theme !== "dark");
}

function listenToKeys(event) {
  const isTyping = event.target.matches("input[type=search], select");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  if (event.key === "d") {
    switchTheme();
  }
  if (event.key === "/") {
    const field = document.querySelector("input[type=search]");
    if (field) {
      event.preventDefault();
      field.focus();
    }
  }
  if (event.key === "[" || event.key === "]") {
    moveSlider(event.key === "]" ? 1 : -1);
  }
}

// Move the first slider of the page by one place, as if by hand.
function moveSlider(by) {
  const input = document.querySelector("input[type=range]");
  if (input) {
    input.value = Number(input.value) + by;
    input.dispatchEvent(new Event("input"));
  }
}

start();
