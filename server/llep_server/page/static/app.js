// Starts the page: which view and engine is shown, what is asked how often, and what to say when no answer comes.

import { ApiError, follow, get, key } from "./api.js";
import { announce, by, h, text } from "./dom.js";
import * as format from "./format.js";
import { decisionsView } from "./decisions.js";
import { eventsView } from "./events.js";
import { liveView } from "./live.js";
import { placementView } from "./placement.js";
import { recordingsView } from "./recordings.js";
import { settingsView } from "./settings.js";

const TICK_MS = 250;
const RETRY_S = [1, 2, 4, 8];
const HIDDEN_S = 60; // a page that nobody has looked at for so long gives its stream back
const TITLES = { live: "Live", decisions: "Decisions", placement: "Placement", settings: "Settings", recordings: "Recordings", events: "Events" };

/** What the views share. `engine` is the id of the one that is shown, "" while there is none. */
const app = {
  view: "live",
  engine: "",
  engines: [],
  loads: new Map(),
  answeredAt: 0,
  problem: null,
  isReadOnly: false,
  current: () => app.engines.find((engine) => engine.id === app.engine) ?? null,
  refresh: (...names) => tasks.forEach((task) => names.includes(task.name) && (task.due = 0)),
  select: (engine) => go(app.view, engine),
  open: (view, engine = app.engine) => go(view, engine),
  failed,
};
const views = { live: liveView, decisions: decisionsView, placement: placementView, settings: settingsView, recordings: recordingsView, events: eventsView };
const tasks = [{ name: "engines", every: 2, run: loadEngines, view: null, due: 0 }];
const hooks = { select: [], stream: [], engines: [] };

/** A view adds what it asks for and what it does: {tasks: [{name, every, run}], onSelect, onStream, onEngines}. */
function mount() {
  for (const [view, make] of Object.entries(views)) {
    const { tasks: own = [], onSelect, onStream, onEngines } = make(app);
    for (const task of own) tasks.push({ view, due: 0, ...task });
    if (onSelect) hooks.select.push(onSelect);
    if (onStream) hooks.stream.push(onStream);
    if (onEngines) hooks.engines.push(onEngines);
  }
}

// What is shown

function go(view, engine) {
  const query = engine ? `?engine=${encodeURIComponent(engine)}` : "";
  if (location.hash === `#/${view}${query}`) return;
  location.hash = `#/${view}${query}`;
}

function route(isFirst = false) {
  const found = /^#\/(\w+)(?:\?(.*))?$/.exec(location.hash);
  if (location.hash && !found) return; // "#main" and the like
  const view = found && found[1] in views ? found[1] : "live";
  const engine = new URLSearchParams(found?.[2] ?? "").get("engine") ?? app.engine;
  const isOther = engine !== app.engine;
  Object.assign(app, { view, engine });
  for (const link of by("views").children) {
    const isHere = link.hash.startsWith(`#/${view}`);
    if (isHere) {
      link.setAttribute("aria-current", "page");
      by("views").scrollLeft = link.offsetLeft - by("views").offsetLeft - 40; // not scrollIntoView: it moves where Tab starts
    } else link.removeAttribute("aria-current");
  }
  text(by("view-title"), TITLES[view]);
  showView();
  if (isOther) selected();
  tasks.forEach((task) => task.view === view && (task.due = 0));
  if (!isFirst) by("main").focus({ preventScroll: true });
}

function showView() {
  const isEmpty = app.answeredAt > 0 && !app.engines.length;
  for (const element of document.querySelectorAll(".view")) {
    const isWaiting = "needsEngine" in element.dataset && !app.engine;
    element.hidden = element.dataset.view !== app.view || isWaiting;
  }
  by("nobody").hidden = !isEmpty || !needsEngine(app.view);
}

const needsEngine = (view) => "needsEngine" in document.querySelector(`[data-view=${view}]`).dataset;

function selected() {
  Object.assign(stream, { lastId: null, failures: 0 });
  stream.abort?.abort();
  const query = app.engine ? `?engine=${encodeURIComponent(app.engine)}` : "";
  for (const link of by("views").children) link.setAttribute("href", link.hash.split("?")[0] + query);
  by("engine-select").value = app.engine;
  tasks.forEach((task) => (task.due = 0));
  hooks.select.forEach((run) => run());
  title();
}

function title() {
  const loads = app.loads.get(app.engine);
  const figure = loads?.imbalance_ratio_after ? `${loads.imbalance_ratio_after.toFixed(2)} · ` : "";
  document.title = `${app.problem ? "no answer · " : figure}${app.engine || "llep"}${app.engine ? " · llep" : ""}`;
}

// What is asked

async function loadEngines() {
  const { data } = await get("v1/engines");
  const before = new Map(app.engines.map((engine) => [engine.id, engine.state]));
  app.engines = data.sort((a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }));
  if (before.size || app.answeredAt) sayChanges(before);
  app.answeredAt ||= Date.now() / 1000;
  fillSelect();
  if (!app.current()) {
    const first = app.engines.find((engine) => engine.state === "live") ?? app.engines[0];
    if (app.engine) {
      announce(`${app.engine} is not here`);
      history.replaceState(null, "", `#/${app.view}`);
    }
    app.engine = first?.id ?? "";
    selected();
  }
  showView();
  hooks.engines.forEach((run) => run());
  title();
}

function sayChanges(before) {
  const news = app.engines.filter((engine) => before.get(engine.id) !== engine.state).map((engine) => `${engine.id} is ${engine.state}`);
  const gone = [...before.keys()].filter((id) => !app.engines.some((engine) => engine.id === id)).map((id) => `${id} is gone`);
  if (news.length + gone.length) announce([...news, ...gone].slice(0, 4).join(", "));
}

function fillSelect() {
  const select = by("engine-select");
  const ids = app.engines.map((engine) => engine.id);
  if (ids.join("\n") !== [...select.options].map((option) => option.value).join("\n")) {
    select.replaceChildren(...ids.map((id) => h("option", { value: id }, id)));
  }
  select.value = app.engine;
  select.parentElement.hidden = !ids.length;
}

function tick() {
  if (!document.hidden && !mustAskKey()) {
    const now = Date.now() / 1000;
    for (const task of tasks) if (isWanted(task) && !task.isRunning && task.due <= now) run(task);
  }
  showState();
}

function isWanted(task) {
  if (!task.view) return true;
  const isSettled = task.isEarly || app.answeredAt > 0 && (app.engine || !needsEngine(task.view)); // first of all: which engine?
  return task.view === app.view && isSettled;
}

async function run(task) {
  Object.assign(task, { isRunning: true, due: Infinity }); // whoever sets it to 0 meanwhile wants another run
  const started = Date.now() / 1000;
  try {
    await task.run();
    if (app.problem) tasks.forEach((other) => (other.due = 0));
    Object.assign(app, { problem: null, answeredAt: Date.now() / 1000 });
    task.failures = 0;
    panelProblem(task, "");
  } catch (error) {
    task.failures = (task.failures ?? 0) + 1;
    if (error instanceof ApiError) failed(error, task);
    else panelProblem(task, `the page could not show this: ${error.message}`);
  } finally {
    // What takes long is asked less often: at most a fifth of the time is spent on it.
    const took = Date.now() / 1000 - started;
    const pause = task.failures ? RETRY_S[Math.min(task.failures, RETRY_S.length) - 1] : 0;
    if (task.due !== 0) task.due = Date.now() / 1000 + Math.max(task.every, 4 * took, pause);
    task.isRunning = false;
  }
}

function panelProblem(task, words) {
  if (!task.place) return;
  const panel = by(task.place).closest(".panel");
  let line = panel.querySelector(":scope > .problem");
  if (!line && !words) return;
  if (!line) {
    line = h("p", { class: "problem", role: "status" });
    panel.querySelector("header").after(line);
  }
  line.hidden = !words;
  text(line, words);
}

/** What an answer that is a failure means for the page as a whole, or for one panel. */
function failed(error, task = {}) {
  if (error.status === 401) {
    key.forget();
    return askKey(error.message);
  }
  if (error.status === 403) app.isReadOnly = true;
  if (error.status === 0 || error.status === 503 || error.status === 504) {
    app.problem = { since: app.problem?.since ?? Date.now() / 1000, error };
    return title();
  }
  panelProblem(task, error.message);
}

// What is said when something is old or away

function showState() {
  const now = Date.now() / 1000;
  const link = by("link");
  const engine = app.current();
  const [state, words] = linkState(engine, now);
  link.dataset.state = state;
  text(by("link-text"), words);
  document.documentElement.dataset.old = app.problem ? "all" : engine?.state === "stale" ? "engine" : "nothing";
  banners(engine);
}

function linkState(engine, now) {
  if (app.problem) return ["bad", `no answer for ${format.seconds(Math.max(1, Math.round(now - (app.answeredAt || app.problem.since))))}`];
  if (!app.answeredAt) return ["wait", "connecting"];
  if (!engine) return ["wait", "no engine"];
  if (engine.state === "stale") return ["bad", `stale, last seen ${format.ago(engine.last_seen_s)}`];
  if (engine.state === "starting") return ["wait", "starting"];
  return ["good", stream.isOpen ? "live" : `live, asked ${format.ago(app.answeredAt, now)}`];
}

function banners(engine) {
  const wanted = [];
  if (app.problem) wanted.push(["answer", "bad", ...problemWords(app.problem.error)]);
  if (!app.problem && engine?.state === "stale") wanted.push(["stale", "bad", ...staleWords(engine)]);
  if (engine?.last_apply_error) wanted.push(["apply", "warn", `${engine.id} could not take a revision: ${engine.last_apply_error}`, `It goes on with revision ${engine.live_revision}. Change the setting, or roll back under Settings.`]);
  if (app.isReadOnly) wanted.push(["read", "info", "This key has scope read: looking works, changing does not.", "Use another key (the button above) to change things."]);
  const place = by("banners");
  for (const old of [...place.children]) if (!wanted.some(([name]) => name === old.dataset.name)) old.remove();
  for (const [name, tone, what, help] of wanted) {
    let banner = place.querySelector(`[data-name=${name}]`);
    if (!banner) {
      banner = h("div", { class: "banner", "data-name": name, "data-tone": tone, role: tone === "bad" ? "alert" : "status" }, h("strong"), h("span"));
      place.append(banner);
    }
    text(banner.firstChild, what);
    text(banner.lastChild, help);
  }
}

function problemWords(error) {
  const old = app.answeredAt ? ` What is shown is from ${new Date(app.answeredAt * 1000).toLocaleTimeString([], { hourCycle: "h23" })}.` : "";
  if (error.status === 0) return ["The control plane does not answer.", `Serving goes on with its last settings.${old} Look whether llep control-plane runs and this machine reaches it; the page goes on by itself when it is back.`];
  return ["The scheduler is away.", `${format.sentence(error.message)} Serving goes on with its last settings.${old} The page goes on by itself when it is back.`];
}

function staleWords(engine) {
  const silent = engine.ranks.filter((rank) => rank.last_seen_s < engine.last_seen_s - 5).map((rank) => rank.rank);
  const who = silent.length && silent.length < engine.ranks.length ? `${format.plural(silent.length, "rank")} of ${engine.id} (${silent.slice(0, 6).join(", ")}${silent.length > 6 ? ", ..." : ""})` : engine.id;
  const help = `What is shown is old. If it still serves, it does so with revision ${engine.live_revision}, and is found again by itself; if not, look at its log, or run llep doctor beside it.`;
  return [`${who} stopped reporting, last seen ${format.ago(engine.last_seen_s)}.`, help];
}

// The key

const mustAskKey = () => key.isNeeded && !key.get();

function askKey(problem = "") {
  text(by("key-problem"), problem);
  by("key-forget").hidden = !key.get();
  if (by("key-dialog").open) return;
  by("key-input").value = "";
  by("key-dialog").showModal();
}

function keyTyped(event) {
  event.preventDefault();
  key.set(by("key-input").value.trim());
  by("key-input").value = "";
  by("key-dialog").close();
  app.isReadOnly = false;
  tasks.forEach((task) => (task.due = 0));
}

// The stream

const stream = { isOpen: false, lastId: null, abort: null, failures: 0 };

async function keepStream() {
  for (;;) {
    const mayRun = app.engine && !mustAskKey() && !(document.hidden && Date.now() / 1000 - hiddenSince > HIDDEN_S) && app.answeredAt;
    if (mayRun) {
      stream.abort = new AbortController();
      try {
        await follow("v1/loads/stream", { engine: app.engine }, { lastId: stream.lastId, signal: stream.abort.signal, onOpen: streamOpened, onEvent: streamed });
      } catch (error) {
        if (error instanceof ApiError && error.status === 401) failed(error);
      }
      stream.isOpen = false;
      if (!stream.abort.signal.aborted) stream.failures += 1;
    }
    const pause = mayRun && stream.failures ? RETRY_S[Math.min(stream.failures, RETRY_S.length) - 1] : 0.3;
    await new Promise((resolve) => setTimeout(resolve, pause * 1000));
  }
}

function streamOpened() {
  Object.assign(stream, { isOpen: true, failures: 0 });
}

function streamed(event) {
  stream.lastId = event.id ?? stream.lastId;
  if (event.event === "problem") return app.refresh("engines"); // which says what it is
  hooks.stream.forEach((run) => run(event));
}

let hiddenSince = Infinity;

function start() {
  mount();
  by("key-open").hidden = !key.isNeeded;
  by("key-open").addEventListener("click", () => askKey());
  by("key-form").addEventListener("submit", keyTyped);
  by("key-forget").addEventListener("click", () => {
    key.forget();
    location.reload();
  });
  by("key-dialog").addEventListener("cancel", (event) => mustAskKey() && event.preventDefault());
  by("skip").addEventListener("click", (event) => {
    event.preventDefault();
    by("main").focus();
  });
  by("metrics-link").hidden = key.isNeeded;
  by("engine-select").addEventListener("change", (event) => app.select(event.target.value));
  window.addEventListener("hashchange", () => route());
  document.addEventListener("visibilitychange", () => {
    hiddenSince = document.hidden ? Date.now() / 1000 : Infinity;
    if (!document.hidden) tick();
    else setTimeout(() => document.hidden && stream.abort?.abort(), HIDDEN_S * 1000 + 1000);
  });
  route(true);
  if (mustAskKey()) askKey();
  setInterval(tick, TICK_MS);
  tick();
  keepStream();
}

start();
