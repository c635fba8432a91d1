// The gateway's page: asks status/... with the key of this tab, draws what comes as text nodes, and sends an admin's
// actions. Nothing here makes markup of text. Source of the fields: serving/status.py, serving/status_facts.py.

const LIVE_MS = 1000, FACTS_MS = 5000, FORGOTTEN_MS = 60000, SILENT_S = 30, KEY = "understudy-key";
const STAGES = ["curate", "discover", "select", "base", "finetune", "validate", "release"];
const $ = (id) => document.getElementById(id);
const state = { session: null, facts: null, drawn: {}, gateways: new Map(), decisions: new Map(), paused: false, round: 0, asked: 0, shown: 0 };

// --- words -------------------------------------------------------------------------------------------------------

const missing = (value) => value === null || value === undefined;
const percent = (value) => (missing(value) ? "" : `${(value * 100).toFixed(1)}%`);
const count = (value) => (missing(value) ? "" : value.toLocaleString("en"));
const short = (sha) => (sha ? sha.slice(0, 12) : "none");
const ms = (value) => (missing(value) ? "" : value < 10 ? `${value.toFixed(1)} ms` : `${Math.round(value).toLocaleString("en")} ms`);
const when = (ts) => new Date(ts * 1000).toISOString().replace("T", " ").slice(0, 19);
const usd = (value) => (missing(value) ? "" : `${value < 0 ? "-" : ""}$${Math.abs(value).toFixed(Math.abs(value) < 1 ? 4 : 2)}`);
const lasting = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
const plural = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;

function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "onclick") made.addEventListener("click", value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && !missing(value)) made.setAttribute(name, value);
  }
  made.append(...children.filter((one) => !missing(one) && one !== ""));
  return made;
}

const badge = (text, kind = text) => el("span", { class: `badge ${kind}` }, text.replaceAll("_", " "));

// columns: [heading, cell(row) -> text or node, class]. Roles are said because a narrow page lays rows out as cards.
function table(caption, columns, rows, { nothing = "None yet.", fresh, kind = "cards" } = {}) {
  if (!rows.length) return el("p", { class: "quiet" }, nothing);
  const head = columns.map(([title, , style]) => el("th", { scope: "col", role: "columnheader", class: style }, title));
  const body = rows.map((row) => el("tr", { role: "row", class: fresh?.(row) ? "fresh" : null },
    ...columns.map(([title, cell, style], place) => el(place ? "td" : "th",
      { role: place ? "cell" : "rowheader", scope: place ? null : "row", class: style, "data-label": title }, cell(row)))));
  return el("div", { class: "scroll" }, el("table", { role: "table", class: kind }, el("caption", {}, caption),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)), el("tbody", { role: "rowgroup" }, ...body)));
}

function tiles(pairs) {
  return pairs.map(([name, value, kind]) => el("div", {}, el("dt", {}, name), el("dd", { class: kind }, value)));
}

// The interval of a rate on a line from 0 to `most`, with the promised epsilon as a line.
function interval([lower, upper], epsilon, most = Math.max(upper, (epsilon ?? 0) * 2, 0.01)) {
  const at = (rate) => String(2 + 140 * Math.min(1, rate / most));
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
  svg.setAttribute("class", "interval");
  svg.setAttribute("viewBox", "0 0 144 16");
  svg.setAttribute("aria-hidden", "true");
  const line = (kind, x1, x2, y1, y2) => {
    const made = document.createElementNS(ns, "line");
    for (const [name, value] of Object.entries({ class: kind, x1, x2, y1, y2 })) made.setAttribute(name, value);
    svg.append(made);
  };
  line("track", "2", "142", "8", "8");
  line("range", at(lower), at(Math.max(upper, lower + most / 100)), "8", "8");
  if (!missing(epsilon)) line("promise", at(epsilon), at(epsilon), "1", "15");
  return el("div", {}, `${percent(lower)} to ${percent(upper)}`, svg);
}

function disagreement(task) {
  const seen = task.evidence;
  if (!seen) return "";
  if (!seen.num_compared) return "nothing compared yet";
  return el("div", {}, `${count(seen.num_disagreements)} of ${count(seen.num_compared)} differ`,
    interval(seen.interval, seen.epsilon));
}

function stageOf(task) {
  const share = task.state === "canary" && task.rollout ? ` ${percent(task.rollout.canary_share)}` : "";
  return el("div", {}, badge(`${task.state}${share}`, task.state),
    task.reason ? el("div", { class: "quiet small" }, task.reason) : null,
    skipped(task) ? el("div", { class: "quiet small" }, `This gateway leaves it out: ${skipped(task)}`) : null);
}

const skipped = (task) => state.facts?.here.skipped[task.task_id];

// --- the server --------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message, waitS) {
    super(message);
    Object.assign(this, { status, waitS });
  }
}

async function ask(path, { body, token } = {}) {
  const key = sessionStorage.getItem(KEY), headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) Object.assign(headers, { "Content-Type": "application/json", "x-understudy-token": token });
  const options = { headers, method: body ? "POST" : "GET", body: body && JSON.stringify(body), cache: "no-store" };
  const reply = await fetch(path, options);
  const found = await reply.json().catch(() => ({}));
  if (reply.ok) return found;
  throw new Refused(reply.status, found.error?.message ?? `The gateway answered ${reply.status}`, Number(reply.headers.get("retry-after")));
}

function say(text) { $("said").textContent = text; }
function trouble(text) { if ($("trouble").textContent !== text) $("trouble").textContent = text; }

async function logIn() {
  if (document.documentElement.dataset.auth === "keys" && !sessionStorage.getItem(KEY)) return logOut("");
  const round = ++state.round;
  try {
    state.session = await ask("status/session");
  } catch (error) {
    return logOut(error.message);
  }
  trouble("");
  $("login").hidden = true;
  $("leave").hidden = state.session.is_open;
  const { is_open, client, role } = state.session;
  $("who").textContent = is_open ? "Open to everybody who reaches it; read only" : `${client}, ${role}`;
  follow(round, FACTS_MS, drawFacts);
  follow(round, LIVE_MS, drawLive);
}

function logOut(why) {
  state.round++;
  sessionStorage.removeItem(KEY);
  Object.assign(state, { session: null, facts: null, drawn: {} });
  state.gateways.clear();
  state.decisions.clear();
  for (const id of ["stage", "actions", "conversion", "tasks", "counts", "live", "releases", "events", "task-body"]) $(id).replaceChildren();
  for (const id of ["board", "task", "leave"]) $(id).hidden = true;
  $("login").hidden = false;
  $("who").textContent = "";
  say("");
  trouble(why);
  $("key").focus();
}

// Calls `draw` again and again until somebody else logs in; a hidden page rests, and a key out of its rate waits.
async function follow(round, everyMs, draw) {
  let waitMs = everyMs;
  while (round === state.round) {
    try {
      if (!document.hidden) await draw(round);
      if (round === state.round) trouble("");
      waitMs = everyMs;
    } catch (error) {
      if (round !== state.round) return;
      if (error.status === 401 || error.status === 403) return logOut(error.message);
      waitMs = Math.max(everyMs, (error.waitS || 5) * 1000);
      trouble(error instanceof Refused ? error.message : "The gateway does not answer; trying again");
    }
    await new Promise((done) => setTimeout(done, waitMs));
  }
}

// --- what is on stage --------------------------------------------------------------------------------------------

// Draws a part only where it differs from what stands there, and leaves the focus where it was.
function draw(id, value, make) {
  const text = JSON.stringify(value);
  if (state.drawn[id] === text) return;
  state.drawn[id] = text;
  const focused = document.activeElement?.id;
  $(id).replaceChildren(...make());
  if (focused && document.activeElement?.id !== focused) $(focused)?.focus();
}

async function drawFacts(round) {
  const turn = ++state.asked, facts = await ask("status/overview");
  if (round !== state.round || turn < state.shown) return; // An action's look may overtake one that was under way.
  const before = state.facts;
  Object.assign(state, { facts, shown: turn });
  announce(before, facts);
  await show();
}

function announce(before, facts) {
  if (!before) return;
  const was = new Map(before.tasks.map((task) => [task.task_id, task.state])), said = [];
  if (before.release !== facts.release) said.push(`Release ${short(facts.release)} is served now.`);
  for (const task of facts.tasks) {
    const old = was.get(task.task_id);
    if (old !== task.state) said.push(`${task.name ?? task.task_id}: ${old ?? "new"} to ${task.state}.`);
  }
  if (before.is_frozen !== facts.is_frozen) said.push(facts.is_frozen ? "Frozen." : "No longer frozen.");
  if (said.length) say(said.join(" "));
}

async function show() {
  const match = /^#\/tasks\/(.+)$/.exec(location.hash);
  $("board").hidden = Boolean(match);
  $("task").hidden = !match;
  if (match) return drawTask(decodeURIComponent(match[1]));
  document.title = "Understudy";
  drawBoard();
}

function drawBoard() {
  const { facts } = state, by = (kind) => facts.tasks.filter((task) => task.state === kind).length;
  draw("stage", [facts.release, facts.created_ts, facts.is_frozen, facts.frozen_reason, facts.here, facts.tasks], () => [
    el("dl", { class: "tiles" }, ...tiles([
      ["Served release", facts.release ? el("code", { title: facts.release }, short(facts.release)) : "none", "text"],
      ["Made", facts.created_ts ? `${when(facts.created_ts)} UTC` : "never", "text"],
      ["Live", count(by("live"))], ["Canary", count(by("canary"))], ["Shadow", count(by("shadow"))],
      ["Refused or demoted", count(by("refused") + by("demoted"))], ["New", count(by("new"))],
    ])),
    facts.is_frozen ? el("p", {}, badge("frozen"), " Only a person changes what is served",
      facts.frozen_reason ? `: ${facts.frozen_reason}` : ".") : null,
    facts.here.release === facts.release ? null
      : el("p", {}, `This gateway still serves ${short(facts.here.release)}; it follows within seconds, or its log says why not.`),
  ].filter(Boolean));
  drawActions(facts);
  draw("conversion", [facts.conversion, silence(facts.conversion)], () => conversionParts(facts.conversion));
  const latencies = [...state.gateways.values()].map((one) => one.latencies), saved = savings();
  draw("tasks", [facts.tasks, facts.here.skipped, latencies, [...saved]], () => [table("Tasks by volume", [
    ["Task", (task) => el("a", { id: `go-${task.task_id}`, href: `#/tasks/${encodeURIComponent(task.task_id)}` }, task.name ?? task.task_id), "wide"],
    ["State", stageOf],
    ["Calls found", (task) => count(task.num_calls), "number"],
    ["Share", (task) => percent(task.share_calls), "number"],
    ["Coverage", (task) => percent(task.coverage), "number"],
    ["Certified bound", (task) => percent(task.upper_bound), "number"],
    ["Epsilon", (task) => percent(task.epsilon), "number"],
    ["Live disagreement", disagreement],
    ["Latency", (task) => latencyOf(task.task_id, latencies), "nowrap"],
    ["Saved", (task) => usd(saved.get(task.task_id)), "number"],
  ], facts.tasks, { nothing: "No tasks yet; next: understudy convert store=STORE" })]);
  draw("releases", [facts.releases, state.session.can_administer, facts.release], () => [table("Releases, the newest first", [
    ["Release", (one) => el("code", { title: one.release }, short(one.release))],
    ["Made, UTC", (one) => when(one.created_ts), "nowrap"],
    ["Specialists", (one) => count(one.num_specialists), "number"],
    ["Refused", (one) => count(one.num_refused), "number"],
    ["Served", (one) => one.is_served ? badge("served", "live") : state.session.can_administer
      ? el("button", { type: "button", id: `promote-${one.release}`, "aria-label": `Promote ${short(one.release)}`, onclick: () => promote(one) }, "Promote…") : "waits"],
  ], facts.releases)]);
  draw("events", facts.events, () => [table("Changes of what is served, the newest first", [
    ["Time, UTC", (one) => when(one.ts), "nowrap"], ["Change", (one) => one.kind.replace("_", " ")], ["By", (one) => one.by],
    ["Release", (one) => el("code", { title: one.release }, short(one.release))],
    ["Before", (one) => el("code", { title: one.before }, short(one.before))],
    ["Evidence", evidenceOf],
  ], facts.events)]);
}

function evidenceOf(event) {
  return Object.entries(event.tasks).map(([task, one]) =>
    `${task}: ${one.from} to ${one.to}, ${one.num_disagreements} of ${one.num_compared} differ`).join("; ");
}

// Seconds without a word of a conversion that should run, in steps of ten; 0 where it speaks.
function silence(one) {
  const silentS = one?.state === "running" ? state.facts.now - one.updated_ts : 0;
  return silentS > SILENT_S ? Math.round(silentS / 10) * 10 : 0;
}

function conversionParts(one) {
  if (!one) return [el("p", { class: "quiet" }, "None yet; next: understudy convert store=STORE")];
  const silentS = silence(one), is = { running: "runs", done: "is done", failed: "has failed" };
  const kind = (stage) => stage in one.seconds ? "over" : stage !== one.stage ? null : one.state === "failed" || silentS ? "stopped" : "now";
  const steps = STAGES.map((stage) => el("li", { class: kind(stage), "aria-current": kind(stage) === "now" ? "step" : null },
    stage in one.seconds ? `${stage}, ${lasting(one.seconds[stage])}` : stage));
  const told = [`It ${silentS ? "has said nothing" : is[one.state]}`, silentS ? ` for ${lasting(silentS)}; it may have been killed` : "",
    one.error ? ` (${one.error}; its log says why)` : "", `. Begun ${when(one.started_ts)} UTC, last word after ${lasting(one.updated_ts - one.started_ts)}.`];
  return [el("p", {}, ...told, one.release ? " It made release " : null, one.release ? el("code", { title: one.release }, short(one.release)) : null),
    el("ol", { class: "steps", "aria-label": "Stages" }, ...steps),
    one.runs.length ? el("div", { class: "runs" }, ...one.runs.map(runProgress)) : null].filter(Boolean);
}

function runProgress(run, place) {
  const name = state.facts.tasks.find((task) => task.task_id === run.name)?.name ?? run.name;
  const seen = [`step ${count(run.step)} of ${count(run.num_steps)}`, missing(run.loss) ? "" : `loss ${run.loss.toFixed(3)}`,
    missing(run.agreement) ? "" : `agreement ${percent(run.agreement)}`, missing(run.tokens_per_s) ? "" : `${count(Math.round(run.tokens_per_s))} tokens/s`];
  return el("div", {}, el("label", { for: `run-${place}` }, name), el("progress", { id: `run-${place}`, max: run.num_steps, value: run.step }),
    el("div", { class: "quiet small" }, seen.filter(Boolean).join(", ")));
}

// task_id -> US dollars: what the LLM would have asked for kept answers, less what they and the checks on them cost. Nothing
// while no LLM has asked for anything: its price is not stated then.
function savings() {
  const found = new Map();
  if (![...state.gateways.values()].some((one) => one.counts.llm_spend_usd > 0)) return found;
  for (const { counts } of state.gateways.values())
    for (const [task, one] of Object.entries(counts.usd)) found.set(task, (found.get(task) ?? 0) + (one.avoided ?? 0) - (one.spent ?? 0));
  return found;
}

// Of the gateway that has answered most of this task's last calls.
function latencyOf(taskId, latencies) {
  const found = latencies.map((one) => one[taskId]).filter(Boolean).sort((a, b) => b.num_calls - a.num_calls)[0];
  return found ? el("div", {}, `p50 ${ms(found.p50_ms)}`, el("br"), `p95 ${ms(found.p95_ms)}`) : "";
}

// --- live --------------------------------------------------------------------------------------------------------

// One address may be several gateways, and each poll reaches one: what they count is added, what they decided is merged.
async function drawLive(round) {
  const live = await ask("status/live");
  if (round !== state.round) return;
  const now = Date.now(), fresh = new Set();
  state.gateways.set(live.gateway, { ...live, seen: now });
  for (const [id, one] of state.gateways) if (now - one.seen > FORGOTTEN_MS) state.gateways.delete(id);
  const isFirst = state.decisions.size === 0;
  for (const one of live.decisions) {
    if (!state.decisions.has(one.call_id) && !isFirst) fresh.add(one.call_id);
    state.decisions.set(one.call_id, one);
  }
  const newest = [...state.decisions.values()].sort((a, b) => b.ts - a.ts).slice(0, 50);
  state.decisions = new Map(newest.map((one) => [one.call_id, one]));
  drawCounts();
  if (isFirst && state.facts && !$("board").hidden) drawBoard(); // The tasks stand there without their latency.
  if (state.paused) return;
  const names = new Map((state.facts?.tasks ?? []).map((task) => [task.task_id, task.name]));
  draw("live", [newest, [...names]], () => [table("The last decisions, the newest first", [
    ["Time, UTC", (one) => when(one.ts).slice(11), "nowrap"],
    ["Task", (one) => names.get(one.task_id) ?? one.task_id ?? "none"],
    ["Decision", (one) => badge(one.action ?? "none")],
    ["Reason", (one) => one.status >= 400 ? `${one.reason}; HTTP ${one.status}` : one.reason],
    ["Confidence", (one) => (missing(one.confidence) ? "" : one.confidence.toFixed(3)), "number"],
    ["Latency", (one) => ms(one.latency_ms), "number"],
    ["Call", (one) => el("code", { title: one.call_id }, one.call_id.slice(0, 8))],
  ], newest, { nothing: "No calls since this gateway started.", fresh: (one) => fresh.has(one.call_id) })]);
}

function drawCounts() {
  const all = [...state.gateways.values()].map((one) => one.counts);
  const sum = (of) => all.reduce((total, one) => total + (of(one) ?? 0), 0);
  const calls = (...actions) => sum((one) => actions.reduce((n, action) => n + (one.calls[action] ?? 0), 0));
  const audits = (word) => sum((one) => Object.values(one.audits).reduce((n, task) => n + (task[word] ?? 0), 0));
  const total = sum((one) => Object.values(one.calls).reduce((a, b) => a + b, 0)), agree = audits("agree"), differ = audits("differ");
  const part = (n) => (total ? `${count(n)} (${percent(n / total)})` : "0");
  const rows = [
    ["Calls", count(total)], ["Answered by a specialist", part(calls("accept", "degrade"))],
    ["Escalated", part(calls("escalate"))], ["Fell back", part(calls("fall_back"))], ["LLM alone", part(calls("llm"))],
    ["Audits that differ", `${count(differ)} of ${count(agree + differ)}`], ["Audits missed", count(sum((one) => one.audits_missed))],
    ["Calls not captured", count(sum((one) => one.calls_dropped))], ["Errors to clients", count(sum((one) => one.errors))],
    ["LLM tokens", usd(sum((one) => one.llm_spend_usd))],
    ["Audits today", usd(sum((one) => one.reference_stream.spent_usd))],
    ["Saved, estimated", savings().size ? usd([...savings().values()].reduce((a, b) => a + b, 0)) : "no price yet"],
  ];
  const since = Math.min(...[...state.gateways.values()].map((one) => one.started_ts));
  $("counted").textContent = `Counted since ${when(since)} UTC by ${plural(all.length, "gateway")} behind this address.`;
  draw("counts", rows, () => tiles(rows));
}

// --- one task ----------------------------------------------------------------------------------------------------

async function drawTask(taskId) {
  const { round } = state, { hash } = location;
  let task;
  try {
    task = await ask(`status/tasks/${encodeURIComponent(taskId)}`);
  } catch (error) {
    if (error.status !== 404) throw error;
  }
  if (round !== state.round || hash !== location.hash) return; // Another task's page may be read by now.
  const name = task ? task.name ?? task.task_id : "No such task";
  document.title = `${name} - Understudy`;
  $("task-title").textContent = name;
  draw("task-body", task ?? null, () => (task ? taskParts(task) : [el("p", {}, "It is not among the tasks of this store.")]));
}

function taskParts(task) {
  const gate = task.gate, most = Math.max(0.01, ...task.arms.map((arm) => arm.interval[1])), parts = [stageOf(task), el("dl", { class: "tiles" }, ...tiles([
    ["Task", el("code", {}, task.task_id), "text"], ["Kind", task.kind ?? "", "text"], ["Calls found", count(task.num_calls)],
    ["Share of calls", percent(task.share_calls)], ["Share of cost", percent(task.share_cost)],
    ["Clients", count(task.num_clients)], ["Sessions", count(task.num_sessions)], ["Saved, estimated", usd(savings().get(task.task_id))],
  ].filter(([, value]) => value !== "")))];
  parts.push(el("h3", {}, "What is promised"));
  if (gate && missing(gate.refused) && !missing(gate.threshold)) {
    parts.push(el("p", {}, `Among kept answers at most ${percent(gate.epsilon)} disagree with the reference (${gate.reference}), `
      + `except with probability ${gate.delta.toPrecision(2)}; about ${gate.population}.`));
    parts.push(el("dl", { class: "tiles" }, ...tiles([
      ["Kept from confidence", gate.threshold.toFixed(4)], ["Coverage", percent(gate.coverage)],
      ["Certified bound", percent(gate.upper_bound)], ["Epsilon", percent(gate.epsilon)],
      ["Calibration calls", count(gate.num_calibration)], ["Kept of them", count(gate.num_accepted)],
      ["Disagreeing of those", count(gate.num_disagreements)],
      ...(gate.num_counted ? [["Counted for the bound", count(gate.num_counted)],
        ["Disagreeing of the counted", count(gate.num_counted_disagreements)]] : []),
      ["Earlier candidates on these calls", count(gate.round)],
    ])));
  } else parts.push(el("p", {}, `Nothing: ${gate?.refused ?? task.reason ?? "no gate was certified"}.`));
  parts.push(el("h3", {}, "Measured on test, before it was served"), table("Ways of answering", [
    ["Way", (arm) => arm.name], ["Calls", (arm) => count(arm.num_calls), "number"], ["Coverage", (arm) => percent(arm.coverage), "number"],
    ["Kept", (arm) => count(arm.num_kept), "number"], ["Differ", (arm) => count(arm.num_disagreements), "number"],
    ["Disagreement", (arm) => percent(arm.disagreement), "number"], ["95% interval; line: epsilon", (arm) => interval(arm.interval, gate?.epsilon, most)],
  ], task.arms, { nothing: "No report of it in the store." }));
  parts.push(el("h3", {}, "Coverage against disagreement, on validation"), table("By threshold", [
    ["Threshold", (point) => missing(point.threshold) ? "" : point.threshold.toFixed(4), "number"],
    ["Coverage", (point) => percent(point.coverage), "number"], ["Disagreement", (point) => percent(point.disagreement), "number"],
  ], thin(task.curve, 12), { nothing: "No report of it in the store.", kind: "narrow" }));
  parts.push(el("h3", {}, "Audited since it is served"));
  const seen = task.evidence;
  parts.push(seen ? el("dl", { class: "tiles" }, ...tiles([
    ["Compared", count(seen.num_compared)], ["Differ", count(seen.num_disagreements)],
    ["95% interval at any time", interval(seen.interval, seen.epsilon), "text"],
    ["Evidence against it", `${seen.peak_risk.toPrecision(3)} of ${count(1 / seen.alpha)}`],
    ["Evidence for it", `${seen.e_value_safety.toPrecision(3)} of ${count(1 / seen.alpha)}`], ["Compared at this stage", count(seen.num_compared_at_stage)],
  ])) : el("p", { class: "quiet" }, "Nothing yet."));
  if (task.changes.length) parts.push(table("Changes by the steward", [
    ["Time, UTC", (one) => when(one.ts), "nowrap"], ["Change", (one) => one.kind.replace("_", " ")], ["Evidence", evidenceOf],
  ], task.changes));
  parts.push(el("h3", {}, "Examples"), el("p", {}, "Content is not served here. Role curator, on a machine with the store: ",
    el("code", {}, `understudy tasks ${task.task_id} --examples`)));
  return parts;
}

const thin = (rows, most) => rows.length <= most ? rows
  : Array.from({ length: most }, (_, place) => rows[Math.round((place * (rows.length - 1)) / (most - 1))]);

// --- an admin's actions ------------------------------------------------------------------------------------------

function drawActions(facts) {
  $("actions").hidden = !state.session.can_administer;
  draw("actions", [facts.roll_back_to, facts.is_frozen, state.session.can_administer], () => [
    el("button", { type: "button", id: "do-rollback", disabled: !facts.roll_back_to, onclick: rollBack }, "Roll back…"),
    facts.is_frozen ? el("button", { type: "button", id: "do-freeze", onclick: unfreeze }, "Unfreeze…")
      : el("button", { type: "button", id: "do-freeze", onclick: freeze }, "Freeze…"),
  ]);
}

// The browser tells that a dialog is closed some time later, on a busy machine after the next one was opened or even
// answered. Heard by each question for itself, that word would deny the next one, or do what was cancelled before.
let answer = () => {};
function settle() { answer($("dialog").returnValue === "yes"); }
$("dialog").addEventListener("close", () => { if (!$("dialog").open) settle(); });

function confirmed({ title, text, yes, danger = false, fields = [] }) {
  settle(); // The one before: its answer stands there until the new one begins as "cancel".
  $("dialog-title").textContent = title;
  $("dialog-text").textContent = text;
  $("dialog-yes").textContent = yes;
  $("dialog-yes").className = danger ? "danger" : "main";
  $("dialog-fields").replaceChildren(...fields);
  const dialog = $("dialog");
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((done) => { answer = done; });
}

async function act(path, body, done) {
  let release;
  try {
    state.session = await ask("status/session"); // A token is good for an hour, a page stays open for days.
    ({ release } = await ask(path, { body, token: state.session.token }));
  } catch (error) {
    return say(`Not done: ${error.message}`);
  }
  try { await drawFacts(state.round); } catch (error) { trouble(error.message); }
  say(done(release)); // Last, instead of what the new facts announce by themselves.
}

async function promote(one) {
  const expected = state.facts.release, stage = el("select", { id: "stage-choice" },
    el("option", { value: "shadow" }, "shadow: compared, serves nobody"),
    el("option", { value: "canary" }, "canary: answers 10% of sessions"), el("option", { value: "live" }, "live: answers all it is sure of"));
  const isSure = await confirmed({
    title: `Promote ${short(one.release)}?`, yes: "Promote", fields: [el("label", { for: "stage-choice" }, "New specialists begin as"), stage],
    text: `It replaces ${short(expected)}. Specialists that are served already keep their stage, except that live makes all of them live.`,
  });
  if (isSure) await act("status/promote", { release: one.release, stage: stage.value, expected }, (sha) => `Release ${short(sha)} is promoted.`);
}

async function rollBack() {
  const { release: expected, roll_back_to: before } = state.facts;
  const text = `Instead of ${short(expected)}, ${short(before)} is served again, within seconds at every gateway.`;
  if (await confirmed({ title: "Roll back?", text, yes: "Roll back", danger: true }))
    await act("status/rollback", { expected }, (sha) => `Rolled back to ${short(sha)}.`);
}

async function freeze() {
  const reason = el("input", { id: "reason", maxlength: "200", autocomplete: "off" });
  const text = "Nothing but a person changes what is served, until it is unfrozen. A specialist that gets worse is not demoted either.";
  if (await confirmed({ title: "Freeze?", text, yes: "Freeze", fields: [el("label", { for: "reason" }, "Reason, for whoever finds it frozen"), reason] }))
    await act("status/freeze", { reason: reason.value }, () => "Frozen.");
}

async function unfreeze() {
  if (await confirmed({ title: "Unfreeze?", text: "Evidence changes what is served again.", yes: "Unfreeze" }))
    await act("status/unfreeze", {}, () => "No longer frozen.");
}

// --- begin -------------------------------------------------------------------------------------------------------

$("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  logIn();
});
$("leave").addEventListener("click", () => logOut(""));
$("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  $("pause").setAttribute("aria-pressed", String(state.paused));
});
addEventListener("hashchange", async () => {
  if (!state.facts) return;
  state.drawn["task-body"] = undefined;
  try { await show(); } catch (error) { trouble(error.message); }
  $($("task").hidden ? "stage-title" : "task-title").focus();
});
logIn();
