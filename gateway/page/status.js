// SPDX-License-Identifier: Apache-2.0
"use strict";

// Everything that an answer has is put into text nodes, and never elsewhere.

const EVERY = 5000; // ms between questions
const ROWS = 500; // rows of a table, at most
const WORDS = 300; // characters of a value, at most
const WAIT = 20000; // ms for an answer
const SURE = 6000; // ms in which a second press counts

const byId = (id) => document.getElementById(id);

// el makes an element; children are elements or text.
function el(tag, cls, ...children) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  e.append(...children);
  return e;
}

// said is a value from outside: cut, without control characters, and its direction its own.
function said(value, cls) {
  let text = String(value ?? "").replace(/[\u0000-\u001f\u007f-\u009f]/g, "\ufffd");
  if (text.length > WORDS) text = text.slice(0, WORDS) + "…";
  return el("bdi", cls, text === "" ? "–" : text);
}

const seconds = (n) => (Number.isFinite(Number(n)) ? Number(n) : 0);

function span(s) {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  for (const [n, name] of units) if (s >= n) return Math.floor(s / n) + " " + name;
  return "0 s";
}

// when shows a moment, Unix seconds, by its distance.
function when(unix, none) {
  const at = seconds(unix);
  if (at <= 0 || at > 8e12) return el("span", "soft", none);
  const d = at - Date.now() / 1000;
  const e = el("time", "", d < 0 ? span(-d) + " ago" : "in " + span(d));
  e.dateTime = new Date(at * 1000).toISOString();
  e.title = e.dateTime;
  return e;
}

function table(caption, heads, rows) {
  const t = el("table", "", el("caption", "", caption));
  const tr = el("tr", "");
  for (const h of heads) {
    const th = el("th", h.number ? "number" : "", h.name);
    th.scope = "col";
    tr.append(th);
  }
  t.append(el("thead", "", tr));
  const body = el("tbody", "");
  for (const r of rows.slice(0, ROWS)) {
    const line = el("tr", "");
    r.forEach((c, i) => {
      const cell = el(i === 0 ? "th" : "td", heads[i].number ? "number" : "", c);
      if (i === 0) cell.scope = "row";
      line.append(cell);
    });
    body.append(line);
  }
  t.append(body);
  return el("div", "wide", t);
}

const col = (name) => ({ name });
const num = (name) => ({ name, number: true });

// Failure is an answer that is none. It is no fault where the gateway was not given what
// was asked for.
class Failure extends Error {
  constructor(text, code) {
    super(text);
    this.code = code;
  }
}

// known is an answer, or nothing of one that failed.
const known = (a) => (a === undefined || a instanceof Failure ? {} : a);

// beside is what lies beside the page, without a name and password that its address may have.
const beside = (path) => new URL(path, location.origin + location.pathname);

async function call(method, request) {
  const reply = await fetch(beside("prpc/Admin." + method), {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request ?? {}), redirect: "error", signal: AbortSignal.timeout(WAIT),
  });
  const text = await reply.text();
  let data = null;
  try { data = JSON.parse(text); } catch { /* a refusal in words */ }
  if (!reply.ok || data === null || typeof data !== "object") {
    throw new Failure(data && typeof data.error === "string" ? data.error : "the answer is " + reply.status, data?.code);
  }
  return data;
}

// series reads the gateway's own lines of the metrics: name, labels as they stand, value.
async function series() {
  const reply = await fetch(beside("metrics"), { redirect: "error", signal: AbortSignal.timeout(WAIT) });
  if (!reply.ok) throw new Failure("the answer is " + reply.status);
  const lines = [];
  for (const line of (await reply.text()).split("\n")) {
    const m = /^dstack_gateway_([a-z0-9_]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (m) lines.push({ name: m[1], labels: m[2] ?? "", value: seconds(m[3]) });
  }
  return lines;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; bytes >= 1024 && i < units.length - 1; i++) bytes /= 1024;
  return (i === 0 ? String(bytes) : bytes.toFixed(1)) + " " + units[i];
}

// pressed are buttons that wait for their second press, by key.
const pressed = new Map();

// drain is a button; one press asks, a second one does it.
function drain(key, what, request, on) {
  const sure = (pressed.get(key) ?? 0) > Date.now();
  const verb = on ? "Drain" : "Resume";
  const b = el("button", sure ? "sure" : "", sure ? "Press again: " + verb.toLowerCase() : verb);
  b.type = "button";
  b.dataset.key = key;
  b.setAttribute("aria-label", (sure ? "Press again to " + verb.toLowerCase() : verb) + " " + what);
  b.addEventListener("click", async () => {
    if (!((pressed.get(key) ?? 0) > Date.now())) {
      pressed.set(key, Date.now() + SURE);
      show();
      setTimeout(show, SURE + 50);
      return;
    }
    pressed.delete(key);
    b.disabled = true;
    try {
      await call("Drain", { ...request, on });
      byId("message").replaceChildren(verb + " ", said(what), ": done.");
    } catch (e) {
      byId("message").replaceChildren(verb + " ", said(what), ": ", said(e.message));
    }
    await ask();
  });
  return b;
}

// answers are the latest, or Failures, by method.
const answers = {};
const asked = ["Status", "GetMeta", "ListZtDomains", "ListMembers", "ListQuarantine", "CtStatus", "metrics"];

const list = (v) => (Array.isArray(v) ? v.filter((x) => x !== null) : []);

function facts(...pairs) {
  const dl = el("dl", "");
  for (const [name, value] of pairs) dl.append(el("dt", "", name), el("dd", "", value));
  return dl;
}

const views = {
  node: ["Status", (s) => {
    const meta = known(answers.GetMeta);
    const unready = list(s.unready);
    return [
      facts(
        ["Health", unready.length ? said("not ready: " + unready.join(", "), "bad") : el("span", "good", "ready")],
        ["Trust", said(s.trust, s.trust === "production" ? "" : "bad")],
        ["Address for guests", said(s.url, "id")], ["Id", said(s.uuid, "id")], ["Tunnel", said(s.tunnel)],
        ["Instances", said(seconds(meta.registered) + ", of which " + seconds(meta.online) + " were heard lately")],
        ["State", s.draining ? el("span", "warn", "draining: takes no new connections") : el("span", "good", "takes connections")]),
      drain("node", "this gateway", { instance_id: "" }, !s.draining),
    ];
  }],
  connections: ["metrics", (m) => {
    const all = (name) => m.filter((x) => x.name === name);
    const sum = (name, has) => all(name).reduce((n, x) => n + (!has || x.labels.includes(has) ? x.value : 0), 0);
    const refused = all("connections_refused_total").filter((x) => x.value > 0).sort((a, b) => b.value - a.value);
    return [
      facts(
        ["Open", said(sum("connections_open") + ", of which " + sum("app_connections") + " are joined to an app")],
        ["Accepted", said(sum("connections_accepted_total"))], ["Names that lead nowhere", said(sum("names_unknown_total"))],
        ["Instances not reached", said(sum("dials_failed_total"))],
        ["Relayed", said(size(sum("app_bytes_total", 'direction="up"')) + " to apps, " + size(sum("app_bytes_total", 'direction="down"')) + " to clients")]),
      refused.length ? table("Refused since the start", [col("Code"), num("Connections")], refused.map((x) => [said(x.labels.replace(/^code="(.*)"$/, "$1"), "id"), said(x.value)]))
        : el("p", "soft", "None was refused."),
    ];
  }],
  members: ["ListMembers", (m) => [
    el("p", m.quorum ? "good" : "bad", m.quorum ? "There is a quorum." : "No quorum: certificates, domains and settings cannot change. Apps are served."),
    table("Gateways that agree", [col("Name"), col("Address for guests"), col("Role"), col("State")], list(m.members).map((x) => [
      said(x.name), said(x.url, "id"), said(x.leader ? "leader" : x.learner ? "learner" : "member"),
      x.reachable ? el("span", "good", "reachable") : el("span", "bad", "not reachable")])),
  ]],
  domains: ["ListZtDomains", (d) => {
    const rows = list(d.domains).map((x) => {
      const c = x.cert_status ?? {};
      const life = seconds(c.not_after) - seconds(c.issued_at);
      const left = seconds(c.not_after) - Date.now() / 1000;
      const state = !c.has_cert ? el("span", "warn", "no certificate") : left <= 0 ? el("span", "bad", "expired")
        : seconds(c.issued_at) && left < life / 6 ? el("span", "warn", "ends soon") : el("span", "good", "valid");
      return [said(x.config?.domain, "id"), said(x.config?.port), state, when(c.not_after, "–"), said(c.error, c.error ? "warn" : "soft")];
    });
    const authority = known(answers.Status).authority;
    return [
      el("p", authority === "public" ? "" : "warn", authority === "public" ? "Public authorities certify, by ACME." : "A private authority certifies, which no public client trusts."),
      rows.length ? table("Base domains", [col("Domain"), num("Port"), col("Certificate"), col("Ends"), col("Last error")], rows) : el("p", "soft", "No base domain."),
    ];
  }],
  instances: ["Status", (s) => {
    const filter = byId("filter").value.trim().toLowerCase();
    const hosts = list(s.hosts).filter((h) => !filter || (String(h.app_id) + " " + String(h.instance_id)).toLowerCase().includes(filter));
    hosts.sort((a, b) => (String(a.app_id) + a.instance_id < String(b.app_id) + b.instance_id ? -1 : 1));
    const shown = Math.min(hosts.length, ROWS);
    return [table(shown + " of " + list(s.hosts).length + " instances",
      [col("App"), col("Instance"), num("Connections"), col("Handshake"), col("Attested"), col("Lease ends"), col("New connections")],
      hosts.map((h) => [
        said(h.app_id, "id"), said(h.instance_id, "id"), said(h.num_connections), when(h.latest_handshake, "never"), when(h.attested, "–"), when(h.lease_until, "–"),
        el("span", "", h.draining ? el("span", "warn", "draining ") : "", drain("i " + h.instance_id, "instance " + String(h.instance_id).slice(0, 80), { instance_id: String(h.instance_id) }, !h.draining))]))];
  }],
  ct: ["CtStatus", (c) => {
    const out = [];
    const alarms = list(c.alarms);
    const dropped = seconds(c.dropped);
    if (alarms.length) {
      out.push(table("Alarms: certificates for our names whose keys nobody attested or that cannot be read, and logs that signed two trees", [col("What"), col("Names"), col("Key (SHA-256)"), col("Log"), num("Entry"), col("Found"), col("More")],
        alarms.map((a) => [said(a.kind, "bad"), said(list(a.names).join(" "), "bad"), said(a.key, "id"), said(a.log), said(a.index), when(a.at, "–"), said(a.text)])));
    }
    out.push(el("p", alarms.length + dropped ? "bad" : seconds(c.checked_at) ? "good" : "soft",
      alarms.length + dropped ? "Alarm" + (dropped ? ", and " + dropped + " more for which there was no room." : ".") : seconds(c.checked_at) ? "No certificate of a key that nobody attested." : "No log has been read yet."));
    out.push(facts(["Last read", when(c.checked_at, "never")]));
    if (list(c.logs).length) {
      out.push(table("Logs", [col("Log"), num("Entries"), col("State")], list(c.logs).map((l) => [
        said(l.name), said(l.size), l.error ? said(l.error, "warn") : el("span", "good", "read")])));
    }
    return out;
  }],
  quarantine: ["ListQuarantine", (q) => (list(q.records).length
    ? [table(list(q.records).length + " of " + seconds(q.total), [col("From"), col("When"), col("Code"), col("Why"), col("SHA-256")],
      list(q.records).map((r) => [said(r.source), when(r.at, "–"), said(r.code, "id"), said(r.error), said(r.digest, "id")]))]
    : [el("p", "soft", "None.")])],
};

// alarmTexts are what must not be missed.
function alarmTexts() {
  const out = [];
  const ct = answers.CtStatus;
  const found = ct && !(ct instanceof Failure) ? list(ct.alarms).length + seconds(ct.dropped) : 0;
  if (found) {
    out.push(["alarm", "The watch of certificate logs raised alarms: " + found + ". See certificate logs below."]);
  }
  const m = answers.ListMembers;
  if (m && !(m instanceof Failure) && !m.quorum) out.push(["alarm", "There is no quorum."]);
  const s = answers.Status;
  if (s && !(s instanceof Failure)) {
    if (list(s.unready).length) out.push(["caution", "This gateway is not ready: " + list(s.unready).map((x) => String(x).slice(0, WORDS)).join(", ") + "."]);
    if (s.draining) out.push(["caution", "This gateway is draining."]);
  }
  return out;
}

// place replaces what an element has, if it is other than before, and keeps the focus.
function place(id, children) {
  const box = el("div", "", ...children);
  const now = byId(id).childNodes;
  if (box.childNodes.length === now.length && [...now].every((n, i) => n.isEqualNode(box.childNodes[i]))) return;
  const key = document.activeElement?.dataset?.key;
  byId(id).replaceChildren(...box.childNodes);
  if (key !== undefined && document.activeElement?.dataset?.key !== key) {
    for (const b of byId(id).querySelectorAll("button")) if (b.dataset.key === key) b.focus();
  }
}

// failed says why there is no answer.
function failed(f) {
  const meant = f.code === "admin_unavailable";
  return el("p", meant ? "soft" : "warn", meant ? "" : "Not known: ", said(f.message));
}

// trust puts up what nobody may overlook: that nothing here is protected. Who does not know
// what the trust is, knows no better.
function trust(s) {
  if (s instanceof Failure) return;
  const production = s.trust === "production";
  byId("trust").hidden = production;
  byId("trust").textContent = production ? "" : "DEVELOPMENT TRUST: evidence under roots that no vendor stands for counts here, so nothing that apps do is protected from this machine's owner.";
  document.title = (production ? "" : "[development] ") + "dstack gateway " + seconds(s.id);
}

function show() {
  if (!asked.every((m) => answers[m])) return;
  for (const [id, [method, view]] of Object.entries(views)) {
    const a = answers[method];
    place(id, a instanceof Failure ? [failed(a)] : view(a));
  }
  trust(answers.Status);
  place("alarms", alarmTexts().map(([cls, text]) => el("p", cls, text)));
  const s = answers.Status;
  place("name", s instanceof Failure ? [] : [said(s.id)]);
}

let timer = 0;
let running = false;

async function ask() {
  if (running) return;
  running = true;
  clearTimeout(timer);
  await Promise.all(asked.map(async (m) => {
    try { answers[m] = await (m === "metrics" ? series() : call(m)); } catch (e) { answers[m] = e instanceof Failure ? e : new Failure("the gateway does not answer"); }
  }));
  running = false;
  const lost = asked.every((m) => answers[m] instanceof Failure);
  byId("fresh").className = lost ? "bad" : "soft";
  byId("fresh").textContent = (lost ? "No answer at " : "As of ") + new Date().toISOString().slice(0, 19).replace("T", " ") + " UTC";
  show();
  timer = setTimeout(ask, EVERY);
}

byId("filter").addEventListener("input", show);
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden) ask();
});
ask();
