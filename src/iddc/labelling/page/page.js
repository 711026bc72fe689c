// Clusters are named here; what a name may be and what it does is decided by the server, which
// answers every change with the new state. Text goes in as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const rows = [];
const samples = [];
const NONE = 65535; // a pixel without data
let facts, state, current;
let hovered = null;
let saving = Promise.resolve();
let waiting = 0; // how many changes are not answered yet
let era = 0; // rises when names turn out to be other than those that were on the screen
let dropped = 0; // how many changes were made on a screen of an earlier era, and are not sent

// Talking to the server --------------------------------------------------------------------------

async function ask(path, body, patience = 20000) {
  const options = body && { method: "POST", body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { ...options, signal: AbortSignal.timeout(patience) });
  } catch {
    throw new Error("No answer: iddc label has ended, or waits for another program that uses the " +
      "run. What was saved is kept. Start it again.");
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(error ?? `Refused (${answer.status}).`), { status: answer.status });
}

const load = async () => (await ask("labels")).json();

// One change after the other: each is made from the state that the one before it gave. If others
// have changed the names meanwhile, what was typed before that could be seen is dropped, and told:
// sent with the new state, it would silently take the others' names away.
function change(path, edit) {
  const mine = era;
  waiting += 1;
  $("problem").hidden = true;
  $("status").textContent = "Saving …";
  saving = saving.then(async () => {
    if (mine !== era) dropped += 1;
    else {
      try {
        state = await (await ask(path, { version: state.version, ...edit })).json();
        if (path === "edit") undone.length = 0;
        $("status").textContent = "Saved";
      } catch (error) {
        complain(error);
        see(await load().catch(() => null));
      }
    }
    waiting -= 1;
    if (waiting) return;
    show(state);
    if (dropped) {
      complain(new Error(`${$("problem").hidden ? "The names were changed in another window. " :
        `${$("problem").textContent} `}Changes made after that, which are not saved: ${dropped}.`));
      dropped = 0;
    }
  });
  return saving;
}

// Takes a state from the server; null: it gave none, and nobody knows what is saved.
function see(found) {
  if (state && found?.version !== state.version) era += 1;
  state = found ?? state;
}

function refresh() {
  saving = saving.then(async () => {
    see(await load());
    show(state);
  }).catch(complain);
  return saving;
}

// Redo is an edit like any other: what was there before the undo is written again.
const undone = [];
async function undo() {
  const before = structuredClone(state);
  await change("undo", {});
  if (state.version !== before.version) undone.push(before);
  $("redo").disabled = !undone.length;
}

async function redo() {
  const wanted = undone.pop();
  if (!wanted) return;
  const names = {}, colours = {};
  wanted.names.forEach((name, cluster) => {
    if (name !== state.names[cluster]) names[cluster] = name === facts.numbers[cluster] ? "" : name;
    if (wanted.chosen[cluster] !== state.chosen[cluster] ||
        (wanted.chosen[cluster] && wanted.colours[cluster] !== state.colours[cluster])) {
      colours[cluster] = wanted.chosen[cluster] ? wanted.colours[cluster] : "";
    }
  });
  const rest = undone.splice(0);
  await change("edit", { names, colours });
  undone.push(...rest);
  $("redo").disabled = !undone.length;
}

function complain(error) {
  $("status").textContent = "";
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

function rename(clusters, name) {
  return change("edit", { names: Object.fromEntries(clusters.map((cluster) => [cluster, name])) });
}

// Showing the state ------------------------------------------------------------------------------

const ignored = (cluster) => state.names[cluster] === facts.ignore;
const numbered = (cluster) => state.names[cluster] === facts.numbers[cluster];

function show(found) {
  state = found;
  const classes = new Map();
  state.names.forEach((name, cluster) => {
    if (!classes.has(name)) classes.set(name, []);
    classes.get(name).push(cluster);
  });
  rows.forEach((row, cluster) => {
    const name = state.names[cluster];
    const others = classes.get(name).filter((other) => other !== cluster);
    const written = numbered(cluster) || ignored(cluster) ? "" : name;
    const typing = document.activeElement === row.name && row.name.value !== row.shown;
    if (!typing) row.name.value = written;
    else if (row.shown !== written) {
      complain(new Error(`While you type, ${facts.numbers[cluster]} was named ` +
        `${written || "anew"} elsewhere. Enter replaces that name, Escape keeps it.`));
    }
    row.shown = written;
    row.name.placeholder = ignored(cluster) ? "ignored" : facts.numbers[cluster];
    row.colour.value = state.colours[cluster];
    row.colour.disabled = ignored(cluster);
    row.reset.classList.toggle("own", !state.chosen[cluster] || ignored(cluster));
    row.ignore.setAttribute("aria-pressed", ignored(cluster));
    row.item.classList.toggle("ignored", ignored(cluster));
    row.about.textContent = [
      facts.numbers[cluster],
      facts.samples.length ? percent(facts.shares[cluster]) : "",
      others.length && !ignored(cluster) ? `one class with ${listed(others)}` : "",
    ].filter(Boolean).join(" · ");
  });
  const named = [...classes.keys()].filter((name) => !classes.get(name).some(numbered));
  $("names").replaceChildren(...named.filter((name) => name !== facts.ignore).map((name) => {
    const option = document.createElement("option");
    option.value = name;
    return option;
  }));
  const left = state.names.filter((_, cluster) => numbered(cluster)).length;
  $("summary").textContent = [
    `${rows.length} clusters`, `${state.classes} classes`,
    `${classes.get(facts.ignore)?.length ?? 0} ignored`, `${left} without a name`,
  ].join(" · ");
  $("undo").disabled = !state.undo;
  $("redo").disabled = !undone.length;
  for (const sample of samples.filter(Boolean)) tag(sample);
  paintSoon();
}

function percent(share) {
  if (share === 0) return "in no sample";
  return share < 0.0005 ? "<\u00a00.1\u00a0%" : `${(100 * share).toFixed(1)}\u00a0%`;
}

function listed(clusters) {
  const few = clusters.slice(0, 4).join(", ");
  return clusters.length > 4 ? `${few} and ${clusters.length - 4} more` : few;
}

// The list ---------------------------------------------------------------------------------------

function makeRow(cluster) {
  const item = $("row").content.cloneNode(true).querySelector("li");
  const part = (name) => item.querySelector(`.${name}`);
  const row = { item, cluster, shown: "" };
  for (const name of ["pick", "examples", "name", "about", "colour", "reset", "ignore"]) {
    row[name] = part(name);
  }
  const title = facts.numbers[cluster];
  item.dataset.cluster = cluster;
  row.pick.ariaLabel = `Select ${title}`;
  row.name.ariaLabel = `Name of ${title}`;
  row.name.maxLength = facts.max_name;
  row.colour.ariaLabel = `Colour of ${title}`;
  row.reset.ariaLabel = `Default colour for ${title}`;
  row.ignore.ariaLabel = `Ignore ${title}`;
  row.examples.hidden = !facts.samples.length;
  item.tabIndex = -1;
  for (const control of item.querySelectorAll("input, button")) control.tabIndex = -1;

  row.name.addEventListener("change", () => {
    const name = row.name.value.trim();
    if (name !== row.shown) rename([cluster], name);
  });
  row.colour.addEventListener("input", () => {
    for (const [other, name] of state.names.entries()) {
      if (name === state.names[cluster]) state.colours[other] = row.colour.value;
    }
    paintSoon();
  });
  row.colour.addEventListener("change", () => recolour(cluster, row.colour.value));
  row.reset.addEventListener("click", () => recolour(cluster, ""));
  row.ignore.addEventListener("click", () => toggleIgnored(cluster));
  row.pick.addEventListener("change", showPicked);
  item.addEventListener("focusin", () => makeCurrent(row));
  item.addEventListener("focusout", paintSoon);
  item.addEventListener("mouseenter", () => { hovered = cluster; paintSoon(); });
  item.addEventListener("mouseleave", () => { hovered = null; paintSoon(); });
  item.addEventListener("keydown", (event) => onRowKey(event, row));
  return row;
}

const recolour = (cluster, colour) => change("edit", { colours: { [cluster]: colour } });
const toggleIgnored = (cluster) => rename([cluster], ignored(cluster) ? "" : facts.ignore);

// Only the current row is in the order of the Tab key, or a thousand clusters would be.
function makeCurrent(row) {
  hovered = null; // the pointer may rest on another row
  if (current !== row) {
    for (const [each, index] of [[current, -1], [row, 0]]) {
      if (!each) continue;
      for (const control of [each.item, ...each.item.querySelectorAll("input, button")]) {
        control.tabIndex = index;
      }
      each.item.classList.toggle("current", each === row);
    }
    current = row;
  }
  paintSoon();
}

function onRowKey(event, row) {
  const { key, target, shiftKey } = event;
  if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (target === row.name) {
    if (key === "Enter") {
      row.name.blur(); // keeps it
      goTo(row, shiftKey ? -1 : 1, true);
    } else if (key === "Escape") {
      row.name.value = row.shown;
      row.item.focus();
    } else return;
  } else if (key === "ArrowDown") goTo(row, 1);
  else if (key === "ArrowUp") goTo(row, -1);
  else if (key === "Home") goTo(row, -Infinity);
  else if (key === "End") goTo(row, Infinity);
  else if (key === "i") toggleIgnored(row.cluster);
  else if (key === "c") row.colour.click();
  else if (target === row.item && key === " ") row.pick.click();
  else if (target === row.item && key === "Enter") startNaming(row);
  else return;
  event.preventDefault();
}

function startNaming(row) {
  row.name.focus();
  row.name.select();
}

function goTo(row, steps, toName = false) {
  const seen = [...$("clusters").children].filter((item) => !item.hidden);
  const place = Math.min(seen.length - 1, Math.max(0, seen.indexOf(row.item) + steps));
  const next = rows[seen[place].dataset.cluster];
  if (toName) startNaming(next);
  else next.item.focus();
}

function arrange() {
  const orders = {
    size: (a, b) => facts.shares[b.cluster] - facts.shares[a.cluster] || a.cluster - b.cluster,
    number: (a, b) => a.cluster - b.cluster,
    name: (a, b) => numbered(a.cluster) - numbered(b.cluster) ||
      state.names[a.cluster].localeCompare(state.names[b.cluster]) || a.cluster - b.cluster,
  };
  $("clusters").append(...[...rows].sort(orders[$("order").value]).map((row) => row.item));
}

function find() {
  const words = $("find").value.trim().toLowerCase();
  rows.forEach((row, cluster) => {
    const text = `${state.names[cluster]} ${facts.numbers[cluster]}`.toLowerCase();
    row.item.hidden = /^\d+$/.test(words) ? cluster !== Number(words) : !text.includes(words);
  });
}

// Several at once --------------------------------------------------------------------------------

const picked = () => rows.filter((row) => row.pick.checked).map((row) => row.cluster);

function showPicked() {
  $("picked").textContent = `${picked().length} selected`;
  $("several").hidden = !picked().length;
}

function unpick() {
  for (const row of rows) row.pick.checked = false;
  $("one").value = "";
  showPicked();
}

$("several").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = $("one").value.trim();
  if (!name) return $("one").focus();
  await rename(picked(), name);
  if ($("problem").hidden) unpick();
});
$("drop").addEventListener("click", () => rename(picked(), facts.ignore).then(unpick));
$("clear").addEventListener("click", unpick);

// Pictures ---------------------------------------------------------------------------------------

async function makeSample(index) {
  const { name, width, height } = facts.samples[index];
  const figure = $("figure").content.cloneNode(true).querySelector("figure");
  const [image, canvas] = ["img", "canvas"].map((tag) => figure.querySelector(tag));
  const told = figure.querySelector("output");
  const file = figure.querySelector(".file");
  file.textContent = file.title = image.alt = name;
  [image.width, image.height, canvas.width, canvas.height] = [width, height, width, height];
  image.src = `images/${index}`;
  $("samples").append(figure);
  await image.decode();
  const sample = { image, width, height };
  sample.clusters = new Uint16Array(await (await ask(`clusters/${index}`)).arrayBuffer());
  sample.context = canvas.getContext("2d");
  sample.pixels = sample.context.createImageData(width, height);
  sample.tags = figure.querySelector(".tags");
  sample.middles = middles(sample);
  samples[index] = sample;
  tag(sample);

  const clusterAt = (event) => {
    const { left, top, width: wide, height: high } = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - left) / wide) * width);
    const y = Math.floor(((event.clientY - top) / high) * height);
    return sample.clusters[Math.min(height - 1, y) * width + Math.min(width - 1, x)];
  };
  canvas.addEventListener("mousemove", (event) => {
    const cluster = clusterAt(event);
    if (cluster === NONE) {
      told.textContent = "no data";
      return;
    }
    const name = numbered(cluster) ? "" : `${state.names[cluster]} · `;
    told.textContent = name + facts.numbers[cluster];
  });
  canvas.addEventListener("mouseleave", () => { told.textContent = ""; });
  canvas.addEventListener("click", (event) => {
    const row = rows[clusterAt(event)];
    if (!row) return;
    row.item.hidden = false;
    row.item.scrollIntoView({ block: "center" });
    startNaming(row);
  });
}

// Where the name of each large cluster stands: amid its longest runs of pixels in a row.
function middles({ clusters, width, height }) {
  const runs = new Map();
  for (let y = 0; y < height; y += 4) {
    for (let x = 0; x < width;) {
      const cluster = clusters[y * width + x], start = x;
      while (x < width && clusters[y * width + x] === cluster) x++;
      if (!runs.has(cluster)) runs.set(cluster, []);
      runs.get(cluster).push({ length: x - start, x: (x + start) / 2 / width, y: (y + 0.5) / height });
    }
  }
  const least = 0.02 * width * height / 4;
  runs.delete(NONE);
  return [...runs].filter(([, own]) => own.reduce((sum, run) => sum + run.length, 0) >= least)
    .map(([cluster, own]) => {
      const longest = own.reduce((most, run) => Math.max(most, run.length), 0);
      const long = own.filter((run) => run.length >= 0.8 * longest);
      return [cluster, long[Math.floor(long.length / 2)]];
    });
}

function tag({ tags, middles }) {
  if (!state) return;
  tags.replaceChildren(...middles.filter(([cluster]) => !ignored(cluster)).map(([cluster, at]) => {
    const span = document.createElement("span");
    span.textContent = numbered(cluster) ? cluster : state.names[cluster];
    span.style.left = `${100 * at.x}%`;
    span.style.top = `${100 * at.y}%`;
    return span;
  }));
}

let frame = 0;
function paintSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    paint();
  });
}

// The colours of classes over the photos; with a current class, its outline, and the rest dark.
function paint() {
  const focused = current?.item.contains(document.activeElement) ? current.cluster : null;
  const lit = $("spotlight").checked ? (hovered ?? focused) : null;
  const alpha = Math.round((lit === null ? 2.55 : 0.6) * $("opacity").value);
  const table = new Uint32Array(state.names.length);
  const inside = state.names.map((name, cluster) =>
    lit !== null && (ignored(lit) ? cluster === lit : name === state.names[lit]));
  for (const cluster of state.names.keys()) {
    if (lit !== null && !inside[cluster]) table[cluster] = 0xb0100c0c;
    else if (!ignored(cluster)) table[cluster] = abgr(state.colours[cluster], alpha);
  }
  for (const { clusters, context, pixels, width } of samples.filter(Boolean)) {
    const out = new Uint32Array(pixels.data.buffer);
    for (let place = 0; place < out.length; place++) {
      const cluster = clusters[place];
      const right = (place + 1) % width ? clusters[place + 1] : cluster;
      const below = clusters[place + width] ?? cluster;
      const edge = !inside[cluster] !== !inside[right] || !inside[cluster] !== !inside[below];
      out[place] = edge ? 0xffffffff : table[cluster];
    }
    context.putImageData(pixels, 0, 0);
  }
}

function abgr(colour, alpha) {
  const rgb = parseInt(colour.slice(1), 16);
  return ((alpha << 24) | ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16)) >>> 0;
}

// What a cluster looks like: where it fills most, all else veiled. Drawn once, when first seen.
function drawExamples(row) {
  const side = facts.tile;
  const gap = side / 28;
  const context = row.examples.getContext("2d");
  row.examples.width = 3 * side + 2 * gap;
  row.examples.height = side;
  facts.examples[row.cluster].forEach(([index, left, top], place) => {
    const { image, clusters, width, height } = samples[index];
    const veil = new ImageData(side, side);
    const out = new Uint32Array(veil.data.buffer);
    for (let y = 0; y < Math.min(side, height - top); y++) {
      for (let x = 0; x < Math.min(side, width - left); x++) {
        const inside = clusters[(top + y) * width + left + x] === row.cluster;
        out[y * side + x] = inside ? 0 : 0xc8808080;
      }
    }
    const layer = new OffscreenCanvas(side, side);
    layer.getContext("2d").putImageData(veil, 0, 0);
    const at = place * (side + gap);
    context.drawImage(image, left, top, side, side, at, 0, side, side);
    context.drawImage(layer, at, 0);
  });
}

// Start ------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.altKey || $("keys").open) return;
  if (target.matches("input:not([type='checkbox'], [type='range'], [type='color']), select")) return;
  const undoing = (event.ctrlKey || event.metaKey ? "z" : "u") === key && !event.shiftKey;
  const redoing = (event.ctrlKey || event.metaKey ? "y" : "r") === key && !event.shiftKey;
  if (undoing) $("undo").click();
  else if (redoing) $("redo").click();
  else if (event.ctrlKey || event.metaKey) return;
  else if (key === "/") $("find").focus();
  else if (key === "?") $("help").click();
  else return;
  event.preventDefault();
});
$("undo").addEventListener("click", undo);
$("redo").addEventListener("click", redo);
$("done").addEventListener("click", async () => {
  await saving;
  try {
    await ask("done", {});
  } catch (error) {
    return complain(error);
  }
  document.body.classList.add("ended");
  $("problem").hidden = true;
  $("status").textContent = "";
  $("ended").hidden = false;
  window.removeEventListener("focus", refresh);
});
$("more").addEventListener("click", async () => {
  $("more").disabled = true;
  $("more").textContent = "Adding images …";
  await saving;
  try {
    await ask("more", {}, 300000);
    location.reload();
  } catch (error) {
    complain(error);
  }
});
$("help").addEventListener("click", () => $("keys").showModal());
$("find").addEventListener("input", find);
$("find").addEventListener("keydown", ({ key }) => {
  const first = $("clusters").querySelector("li:not([hidden])");
  if (key !== "Escape" && !(key === "Enter" && first)) return;
  // The filter ends here, or the other clusters would stay hidden.
  $("find").value = "";
  find();
  if (key === "Enter") startNaming(rows[first.dataset.cluster]);
});
$("order").addEventListener("change", arrange);
$("opacity").addEventListener("input", paintSoon);
$("spotlight").addEventListener("change", paintSoon);
window.addEventListener("focus", refresh);

async function start() {
  facts = await (await ask("facts")).json();
  document.title = `${facts.run} · iddc label`;
  $("run").textContent = facts.run;
  $("file").textContent = facts.file;
  $("next").textContent = facts.next;
  $("more").hidden = !facts.more;
  const many = facts.samples.length > 0;
  $("none").hidden = many;
  for (const name of ["opacity", "spotlight"]) $(name).disabled = !many;
  if (!many) $("order").value = "number";
  rows.push(...facts.numbers.map((_, cluster) => makeRow(cluster)));
  await refresh();
  if (!state) return;
  arrange();
  makeCurrent(rows[$("clusters").firstElementChild.dataset.cluster]);
  await Promise.all(facts.samples.map((_, index) => makeSample(index)));
  paintSoon();
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      drawExamples(rows[target.dataset.cluster]);
    }
  }, { root: $("clusters"), rootMargin: "400px" });
  for (const { item } of rows) watcher.observe(item);
  document.body.dataset.ready = "";
}

start().catch(complain);
