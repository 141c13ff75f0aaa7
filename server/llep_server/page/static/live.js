// The live view: engines, the verdict on one of them, and where its loads are.

import { download, get } from "./api.js";
import { Bars, Heatmap, TimeChart } from "./charts.js";
import { now } from "./clock.js";
import { by, chosen, h, meter, Table, text, tiles, empty } from "./dom.js";
import * as format from "./format.js";

const MANY_ENGINES = 8;
const WORTH_WINDOW_S = 3600;
const CHART_SPAN_S = { 10: 60, 60: 300, 600: 900, 3600: 3600 };
const REASONS = {
  lend: "weights were lent",
  replica: "resident replicas were enough",
  balanced: "below the threshold",
  small_batch: "fewer tokens than min_batch_tokens",
  no_gain: "lending would not have paid",
  no_slot: "the lending pool was full",
  memory: "the memory budget was used up",
  off: "switched off by mode, phases or layers",
  error: "failed, see Events",
};

export function liveView(app) {
  const engines = enginesTable(app);
  const charts = {
    imbalance: new TimeChart(by("imbalance"), "Imbalance"),
    ranks: new Bars(by("ranks"), "Pairs routed to and computed by each rank"),
    memory: new Bars(by("memory"), "Memory of each rank", { unit: format.bytes }),
    matrix: new Heatmap(by("matrix"), "Loads by layer", by("scale")),
  };
  const hot = hotTable();
  const history = new History();
  const shown = () => ({ window: Number(chosen(by("window"))), phase: chosen(by("phase")) });
  const threshold = () => app.threshold ?? null;
  let worth = null; // over WORTH_WINDOW_S: probes are rare
  let isDrawn = false;

  async function loadLoads() {
    const { window, phase } = shown();
    const all = await get("v1/loads", { window_s: window });
    app.loads = new Map(all.data.map((loads) => [loads.engine, loads]));
    let own = app.loads.get(app.engine);
    if (phase && app.engine) [own] = (await get("v1/loads", { window_s: window, engine: app.engine, phase })).data;
    engines.update();
    if (own && own.engine === app.engine) showLoads(own);
  }

  function showLoads(loads) {
    const engine = app.current();
    if (!isDrawn) requestAnimationFrame(() => performance.mark("llep:first-picture"));
    isDrawn = true;
    tiles(by("tiles"), verdict(engine, loads, threshold(), worth));
    showReasons(loads.decisions);
    const [routed, computed] = ["routed_tokens", "computed_tokens"].map((name) => loads.ranks.map((rank) => rank[name]));
    const sum = computed.reduce((total, value) => total + value, 0);
    charts.ranks.update({
      fills: [
        { name: "routed", values: routed, colour: "before" },
        { name: "computed", values: computed, colour: "after" },
      ],
      line: { value: sum / Math.max(computed.length, 1) },
      note: (at) => [sum ? `computed ${format.ratio((computed[at] * computed.length) / sum)}× fair share` : "", rankWords(engine?.ranks[at])].filter(Boolean),
      problem: sum || routed.some(Boolean) ? null : `No pair in the last ${format.seconds(shown().window)}.`,
    });
    showMemory(loads);
  }

  function showMemory(loads) {
    const of = (name) => loads.ranks.map((rank) => rank[name]);
    const budget = of("memory_budget_bytes");
    const tightest = tightestDevice(loads);
    text(by("device-hint"), tightest ? `tightest device: ${format.bytes(tightest.device_free_bytes)} free of ${format.bytes(tightest.device_total_bytes)} (rank ${tightest.rank})` : "");
    charts.memory.update({
      fills: [{ name: "used", values: of("memory_used_bytes"), colour: "used" }],
      frames: [{ name: "budget", values: budget, colour: "muted" }],
      ticks: [{ name: "peak", values: of("memory_peak_bytes"), colour: "peak" }],
      note: (at) => deviceWords(loads.ranks[at]),
      problem: budget.some(Boolean) ? null : "No rank has reserved memory: the engine runs without a lending pool.",
    });
  }

  async function loadHistory() {
    const span = CHART_SPAN_S[shown().window];
    await history.load(app.engine, span, shown().phase);
    charts.imbalance.update({ points: history.points, threshold: threshold(), span, now: now(), gap: history.step * 3.5 });
  }

  async function loadThreshold() {
    const { settings } = await get("v1/settings", { engine: app.engine });
    const held = settings.find(({ key }) => key === "imbalance_threshold")?.value ?? null;
    if (held === app.threshold) return;
    app.threshold = held;
    app.refresh("loads", "history", "matrix");
  }

  async function loadMatrix() {
    const matrix = await get("v1/loads/matrix", matrixQuery());
    if (matrix.engine !== app.engine) return;
    const hasPairs = matrix.values.some((row) => row.some(Boolean));
    charts.matrix.update(matrix, matrix.by === "rank" ? threshold() : null, hasPairs ? null : `No pair in the last ${format.seconds(shown().window)}.`);
  }

  function matrixQuery() {
    const columns = chosen(by("by"));
    return { engine: app.engine, by: columns, stage: columns === "expert" ? "before" : chosen(by("stage")), window_s: shown().window, phase: shown().phase };
  }

  async function loadHot() {
    hot.update((await get("v1/loads/hot", { engine: app.engine, limit: 20, window_s: shown().window, phase: shown().phase })).data);
  }

  async function loadWorth() {
    const { data } = await get("v1/loads", { engine: app.engine, window_s: WORTH_WINDOW_S, phase: shown().phase });
    worth = data[0]?.engine === app.engine ? data[0].worth : null;
  }

  /** Once a second, with loads over the last 10 s: shown at once if that is what is wanted. */
  function onStream({ event, data }) {
    const loads = event === "loads" && data.loads.find((one) => one.engine === app.engine);
    if (!loads || app.view !== "live") return;
    if (shown().window === 10 && !shown().phase) showLoads(loads);
    app.refresh("history");
  }

  function refresh() {
    by("stage").disabled = chosen(by("by")) === "expert";
    app.refresh("loads", "history", "matrix", "hot", "threshold", "worth");
  }

  for (const name of ["window", "phase", "by", "stage"]) by(name).addEventListener("change", refresh);
  by("matrix-csv").addEventListener("click", () =>
    download("v1/loads/matrix", { ...matrixQuery(), format: "csv" }, `${app.engine}-layers-by-${chosen(by("by"))}.csv`).catch(app.failed),
  );

  return {
    tasks: [
      { name: "loads", every: 2, run: loadLoads, place: "engines", isEarly: true },
      { name: "threshold", every: 10, run: loadThreshold },
      { name: "history", every: 2, run: loadHistory, place: "imbalance" },
      { name: "matrix", every: 3, run: loadMatrix, place: "matrix" },
      { name: "hot", every: 5, run: loadHot, place: "hot" },
      { name: "worth", every: 10, run: loadWorth },
    ],
    onStream,
    onEngines: () => engines.update(),
    onSelect: () => {
      history.clear();
      app.threshold = worth = null;
      text(by("engine-name"), app.engine);
      engines.update();
      if (app.loads.has(app.engine) && !shown().phase) showLoads(app.loads.get(app.engine));
      refresh();
    },
  };
}

/** Points of the imbalance chart: asked for once in full, then only what is new. */
class History {
  clear() {
    Object.assign(this, { points: [], of: "" });
  }

  constructor() {
    this.clear();
  }

  async load(engine, span, phase) {
    const of = JSON.stringify([engine, span, phase]);
    const step = span <= 300 ? 1 : span <= 900 ? 10 : 60;
    if (of !== this.of) Object.assign(this, { points: [], of, step });
    const since = this.points.at(-1)?.time_s ?? 0;
    const window = Math.min(span, Math.max(Math.ceil(now() - since) + 2 * step, 3 * step));
    const { data } = await get("v1/loads/history", { engine, window_s: window, step_s: step, phase });
    if (of !== this.of || !data.length) return;
    const kept = this.points.filter((point) => point.time_s < data[0].time_s - step / 2 && point.time_s > now() - span - step);
    this.points = [...kept, ...data.map(pointOf)];
  }
}

function pointOf({ time_s, tokens, imbalance_ratio_before, imbalance_ratio_after }) {
  return { time_s, tokens, before: imbalance_ratio_before, after: imbalance_ratio_after };
}

function tightestDevice({ ranks }) {
  const known = ranks.filter((rank) => rank.device_total_bytes);
  return known.sort((a, b) => a.device_free_bytes / a.device_total_bytes - b.device_free_bytes / b.device_total_bytes)[0];
}

function deviceWords({ device_free_bytes: free, device_total_bytes: total }) {
  return total ? [`device: ${format.bytes(free)} free of ${format.bytes(total)}`] : [];
}

/** What lending was measured to be worth: a figure only where the probes tell it from chance. */
function worthTile(worth) {
  const name = "Measured gain";
  if (!worth) return { name, value: "–", note: "no probes in the last hour" };
  const { gain_ratio: gain, error_ratio: error, saved_s: saved, lent_steps: lent, probed_steps: probed } = worth;
  if (gain === null) return { name, value: "–", note: `too few probes yet: ${format.count(probed)} of ${format.count(lent + probed)} steps` };
  const isSure = Math.abs(gain) > 2 * error;
  return { name, value: `${gain >= 0 ? "+" : "−"}${format.percent(Math.abs(gain))}`, note: `± ${format.percent(2 * error)}, ${format.seconds(saved)} saved; ${format.count(probed)} of ${format.count(lent + probed)} steps probed in the last hour`, tone: isSure ? (gain > 0 ? "good" : "warn") : "" };
}

function verdict(engine, loads, threshold, worth) {
  const { imbalance_ratio_before: before, imbalance_ratio_after: after, window_s: window } = loads;
  const routed = loads.ranks.reduce((sum, rank) => sum + rank.routed_tokens, 0);
  const fullest = loads.ranks.reduce((most, rank) => Math.max(most, rank.memory_budget_bytes ? rank.memory_used_bytes / rank.memory_budget_bytes : 0), 0);
  const each = (value) => `${format.count(value / Math.max(window, 1e-9))}/s`;
  const isOver = threshold !== null && after !== null && after > threshold;
  return [
    { name: "Imbalance", value: before === null ? "idle" : `${format.ratio(before)} → ${format.ratio(after)}`, note: threshold ? `threshold ${format.ratio(threshold)}` : "before → after", tone: before === null ? "" : isOver ? "warn" : "good" },
    { name: "Slowest rank", value: before && after ? `${format.percent(Math.max(0, 1 - after / before))} less` : "–", note: "than under plain EP" },
    { name: "Tokens", value: each(loads.tokens), note: format.plural(loads.layer_steps, "layer-step") },
    worthTile(worth),
    { name: "Lends", value: each(loads.lends), note: `${format.bytes(loads.lend_bytes / Math.max(window, 1e-9))}/s` },
    { name: "Spilled", value: routed ? format.percent(loads.spilled_tokens / routed) : "–", note: "of pairs, off home rank" },
    { name: "Memory", value: format.percent(fullest), note: "of budget, fullest rank", tone: fullest > 0.95 ? "warn" : "" },
    { name: "Mode", value: engine?.mode ?? "–", note: engine ? revisionWords(engine) : "" },
  ];
}

function rankWords(rank) {
  return rank ? `revision ${rank.live_revision}, seen ${format.ago(rank.last_seen_s)}` : "";
}

function revisionWords(engine) {
  if (engine.desired_revision === engine.live_revision) return `revision ${engine.live_revision} since step ${format.count(engine.live_since_step)}`;
  const where = engine.held_revision === engine.desired_revision ? "held, live at the next step" : "on its way";
  return `revision ${engine.live_revision}; ${engine.desired_revision} is ${where}`;
}

function showReasons(decisions) {
  const total = Object.values(decisions).reduce((sum, value) => sum + value, 0);
  if (!total) return by("reasons").replaceChildren(empty("Nothing was decided in this window."));
  const rows = Object.entries(decisions).filter(([, value]) => value).sort((a, b) => b[1] - a[1]);
  by("reasons").replaceChildren(
    h(
      "ul",
      {},
      ...rows.map(([name, value]) =>
        h("li", { "data-reason": name }, h("b", {}, format.decision(name)), h("span", { class: "about" }, REASONS[name] ?? ""), meter(value / total, `${format.percent(value / total)}`), h("span", { class: "number" }, format.count(value))),
      ),
    ),
  );
}

function enginesTable(app) {
  const loads = (engine) => app.loads.get(engine.id);
  const rate = (engine, name) => (loads(engine) ? `${format.count(loads(engine)[name] / Math.max(loads(engine).window_s, 1e-9))}/s` : "–");
  const table = new Table(
    by("engines"),
    [
      { head: "Engine", class: "name", version: () => 0, cell: (engine) => h("button", { type: "button", class: "link-button", onclick: () => app.select(engine.id) }, engine.id), title: (engine) => engine.id },
      { head: "State", version: (engine) => engine.state, cell: (engine) => h("span", { class: "state", "data-state": engine.state }, h("i", { class: "dot", "aria-hidden": true }), engine.state) },
      { head: "Model", cell: (engine) => engine.model_name },
      { head: "Layout", cell: (engine) => `EP ${engine.ep_size} · TP ${engine.tp_size} · DP ${engine.dp_size}`, title: (engine) => `${engine.num_layers} MoE layers, ${engine.num_experts} experts, top ${engine.top_k}, ${engine.quantization}, ${engine.dtype}, ${engine.backend}, vLLM ${engine.vllm_version}` },
      { head: "Mode", cell: (engine) => engine.mode },
      { head: "Revision", class: "number", cell: (engine) => (engine.live_revision === engine.desired_revision ? String(engine.live_revision) : `${engine.live_revision} → ${engine.desired_revision}`), title: revisionWords },
      { head: "Imbalance", class: "number", cell: (engine) => `${format.ratio(loads(engine)?.imbalance_ratio_before)} → ${format.ratio(loads(engine)?.imbalance_ratio_after)}`, title: () => "before → after" },
      { head: "Tokens", class: "number", cell: (engine) => rate(engine, "tokens") },
      { head: "Lends", class: "number", cell: (engine) => rate(engine, "lends") },
      { head: "Seen", class: "number", cell: (engine) => format.ago(engine.last_seen_s) },
    ],
    { key: (engine) => engine.id, none: "No engine of that name.", caption: "Engines", row: (element, engine) => element.toggleAttribute("data-selected", engine.id === app.engine) },
  );
  const filter = by("engines-filter");
  const update = () => {
    const words = filter.value.toLowerCase().trim();
    const found = app.engines.filter((engine) => `${engine.id} ${engine.model_name} ${engine.state} ${engine.mode}`.toLowerCase().includes(words));
    filter.hidden = app.engines.length <= MANY_ENGINES && !words;
    const live = app.engines.filter((engine) => engine.state === "live").length;
    text(by("engines-count"), `${live} of ${app.engines.length} live`);
    table.update(found);
  };
  filter.addEventListener("input", update);
  return { update };
}

function hotTable() {
  let hottest = 1;
  const table = new Table(
    by("hot"),
    [
      { head: "Layer", class: "number", cell: (expert) => String(expert.layer) },
      { head: "Expert", class: "number", cell: (expert) => String(expert.expert) },
      { head: "Home rank", class: "number", cell: (expert) => String(expert.home_rank) },
      { head: "Load", version: (expert) => `${expert.load_ratio.toFixed(2)} ${hottest}`, cell: (expert) => meter(expert.load_ratio / hottest, `${format.ratio(expert.load_ratio)}×`) },
      { head: "Share of its layer", class: "number", cell: (expert) => format.percent(expert.share) },
      { head: "Pairs", class: "number", cell: (expert) => format.count(expert.tokens) },
      { head: "Hot for", class: "number", cell: (expert) => format.seconds(Math.round(expert.hot_for_s)) },
      { head: "Replicas on", cell: (expert) => (expert.replica_ranks.length ? expert.replica_ranks.map((rank) => `rank ${rank}`).join(", ") : "none") },
    ],
    { key: (expert) => `${expert.layer}/${expert.expert}`, none: "No expert stands out in this window.", caption: "Hot experts" },
  );
  return {
    update(experts) {
      hottest = Math.max(1, ...experts.map((expert) => expert.load_ratio));
      table.update(experts);
    },
  };
}
