// SPDX-License-Identifier: Apache-2.0

// The verifier page. It decides nothing: it obtains evidence, hands it to the
// module in a worker, and shows the verdict. Everything in a verdict may have been
// written by an attacker, so text reaches the document as text nodes only; the
// page's policy (require-trusted-types-for) has the browser enforce that.
"use strict";

(() => {
  const EVIDENCE_PATH = "/.well-known/dstack/attest";
  const MAX_EVIDENCE = 16 << 20; // bytes, as verifier.MaxSource
  const ASK_TIMEOUT = 60_000; // milliseconds, as channel.FetchEvidence
  const VERIFY_TIMEOUT = 30_000;
  const MAX_SHOWN = 4096; // characters of one value

  const $ = (id) => document.getElementById(id);
  const value = (id) => $(id).value.trim();

  // Problem is what the page itself reports, in the form of the module's errors.
  class Problem extends Error {
    constructor(code, message, fix = "") {
      super(message);
      Object.assign(this, { code, fix });
    }
  }

  // printable keeps hostile text from hiding or reordering what stands beside it:
  // control, format and unassigned characters are replaced.
  const printable = (text) => {
    const s = String(text);
    return (s.length > MAX_SHOWN ? s.slice(0, MAX_SHOWN) + "…" : s).replace(/[\p{C}\u2028\u2029]/gu, "\uFFFD");
  };

  // el makes an element. Strings among the children become text.
  const el = (tag, attributes = {}, ...children) => {
    const e = document.createElement(tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    for (const c of children.flat(Infinity)) {
      if (c !== null && c !== undefined && c !== "") e.append(c instanceof Node ? c : printable(c));
    }
    return e;
  };

  const hex = (bytes) => Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");

  // ---- the module ----

  let module; // its bytes
  let notBefore = null; // returns a time that the page's server vouches for (threats.md F03)
  let worker = null;
  let questions = 0;

  async function load() {
    let response;
    try {
      response = await fetch("dstack.wasm.gz", { credentials: "omit" });
    } catch {
      throw new Problem("verifier_missing", "the verifier could not be loaded", location.protocol === "file:" ? "serve this directory with a web server; browsers load nothing for pages of file:" : "reload the page");
    }
    if (!response.ok) throw new Problem("verifier_missing", `the verifier could not be loaded: ${response.status}`, "build the directory with scripts/web.sh");
    const date = Date.parse(response.headers.get("Date") ?? "");
    if (!Number.isNaN(date)) {
      const began = performance.now();
      notBefore = () => new Date(date + performance.now() - began).toISOString();
    }
    let bytes = new Uint8Array(await response.arrayBuffer());
    // Some servers have the browser decompress the file already.
    if (bytes[0] === 0x1f && bytes[1] === 0x8b) {
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    }
    module = bytes;
    if (crypto.subtle) {
      $("page-hash").textContent = hex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
    } else {
      $("page-hash").textContent = "not computed: over plain HTTP anybody on the way could have changed this page, and its word on a hash with it";
    }
    $("page-version").textContent = printable(await start());
  }

  // start gives the module a thread, and returns its version.
  function start() {
    const name = "worker.js";
    const policy = window.trustedTypes?.createPolicy;
    start.policy ??= policy ? trustedTypes.createPolicy("dstack", { createScriptURL: (url) => { if (url !== name) throw new TypeError("no script of ours"); return url; } }) : { createScriptURL: (url) => url };
    worker = new Worker(start.policy.createScriptURL(name));
    return new Promise((resolve, reject) => {
      worker.onmessage = ({ data }) => data.ready ? resolve(data.version) : reject(new Problem("verifier_failed", `the verifier did not start: ${data.failed}`));
      worker.onerror = () => reject(new Problem("verifier_failed", "the verifier did not start", "this browser may be too old, or the directory incomplete: build it with scripts/web.sh"));
      worker.postMessage({ module });
    });
  }

  // judge asks the module.
  async function judge(evidence, options) {
    await ready;
    if (!worker) await start();
    const id = ++questions;
    return new Promise((resolve, reject) => {
      const fail = (message) => {
        clearTimeout(timer);
        worker.terminate();
        worker = null;
        reject(new Problem("verifier_failed", message, "keep the evidence and report it: no evidence should do that"));
      };
      const timer = setTimeout(() => fail("the verifier took too long and was stopped"), VERIFY_TIMEOUT);
      worker.onerror = () => fail("the verifier failed");
      worker.onmessage = ({ data }) => {
        if (data.id !== id) return;
        if (data.failed) return fail(`the verifier failed: ${data.failed}`);
        clearTimeout(timer);
        resolve({ answer: data.answer, milliseconds: data.milliseconds });
      };
      worker.postMessage({ id, evidence, options });
    });
  }

  // ---- evidence ----

  const loopback = (host) => host === "localhost" || host.endsWith(".localhost") || /^127(\.\d+){3}$/.test(host) || host === "[::1]";

  // endpoint takes an address as people write it.
  function endpoint(text) {
    const bad = (why) => new Problem("evidence_url", `this is no address of an instance: ${why}`, "give one such as https://host:8090");
    let url;
    try {
      url = new URL(/^[a-z][a-z0-9+.-]*:\/\//i.test(text) ? text : `https://${text}`);
    } catch {
      throw bad("not a URL");
    }
    if (url.protocol !== "https:" && url.protocol !== "http:") throw bad("the scheme must be https or http");
    if (url.username || url.password) throw bad("it carries a user name or password");
    if (url.search || url.hash) throw bad("it has a query or a fragment");
    if (!url.pathname.endsWith(EVIDENCE_PATH)) url.pathname = url.pathname.replace(/\/+$/, "") + EVIDENCE_PATH;
    if (location.protocol === "https:" && url.protocol === "http:" && !loopback(url.hostname)) {
      throw new Problem("evidence_url", "a page that came over https may not ask over plain http", "give an https address, or fetch the evidence with `dstack verify --save` and give it as a report");
    }
    return url;
  }

  // ask sends a nonce to an instance and returns its reply.
  async function ask(url, nonce) {
    const abort = new AbortController();
    const timer = setTimeout(() => abort.abort(), ASK_TIMEOUT);
    try {
      let response;
      try {
        response = await fetch(url, {
          method: "POST", mode: "cors", credentials: "omit", cache: "no-store", redirect: "error", referrerPolicy: "no-referrer",
          headers: { "Content-Type": "application/json" }, body: JSON.stringify({ nonce }), signal: abort.signal,
        });
      } catch {
        throw new Problem("evidence_unreachable", abort.signal.aborted ? `${url.host} did not answer in time` : `${url.host} could not be asked`,
          "browsers do not say why: the address may be wrong, its certificate one that your browser does not trust, or it does not answer web pages. `dstack verify` asks without a browser, and a report can be given instead");
      }
      const body = await readAll(response, MAX_EVIDENCE);
      if (!response.ok) throw refusal(url, response.status, body);
      return body;
    } finally {
      clearTimeout(timer);
    }
  }

  async function readAll(response, limit) {
    const parts = [];
    let length = 0;
    const reader = response.body.getReader();
    try {
      for (;;) {
        const { done, value: part } = await reader.read();
        if (done) break;
        length += part.length;
        if (length > limit) {
          await reader.cancel();
          throw new Problem("evidence_too_large", `the answer has more than ${limit} bytes`, "this is no instance, or one that means harm");
        }
        parts.push(part);
      }
    } catch (err) {
      if (err instanceof Problem) throw err;
      throw new Problem("evidence_unreachable", "the answer broke off", "try again");
    }
    const all = new Uint8Array(length);
    let at = 0;
    for (const p of parts) {
      all.set(p, at);
      at += p.length;
    }
    return all;
  }

  // refusal says in its own words why an instance declined.
  function refusal(url, status, body) {
    if (status === 404) return new Problem("evidence_endpoint_absent", `${url.host} has no ${EVIDENCE_PATH}`, "it may be an instance of another kind, or another server: take a report with its own tools and give it here");
    let said = {};
    try {
      said = JSON.parse(new TextDecoder().decode(body.subarray(0, 4096)));
    } catch { /* no words of its own */ }
    const words = typeof said?.error === "string" ? `: it says “${said.error}” (${said.code})` : "";
    return new Problem("evidence_refused", `${url.host} declined with status ${status}${words}`, status === 429 ? "ask again in a while" : "the words are the other side's own; a report can be given instead");
  }

  // ---- what the form says ----

  const files = (id) => Array.from($(id).files);
  const text = async (file) => new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(await file.arrayBuffer());

  async function base64(file) {
    const bytes = new Uint8Array(await file.arrayBuffer());
    let s = "";
    for (let i = 0; i < bytes.length; i += 0x8000) s += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
    return btoa(s);
  }

  async function one(id, read) {
    const [file] = files(id);
    if (!file) return undefined;
    if (file.size > MAX_EVIDENCE) throw new Problem("file_too_large", `${file.name} has ${file.size} bytes`, "give the right file; none of its kind is that large");
    try {
      return await read(file);
    } catch {
      throw new Problem("file_unreadable", `${file.name} cannot be read as text`, "give the right file");
    }
  }

  async function readOptions() {
    const o = {};
    for (const id of ["compose_hash", "app_id", "instance_id", "os_image_hash", "at", "nonce", "report_data"]) {
      if (value(id)) o[id] = value(id);
    }
    for (const id of ["lock", "manifest", "dev_roots", "gpu_evidence"]) {
      const t = await one(id, text);
      if (t !== undefined) o[id] = t;
    }
    if (value("policy") === "file") {
      o.policy = await one("policy-file", text);
      if (o.policy === undefined) throw new Problem("policy_malformed", "no policy file is chosen", "choose one, or another policy");
    } else if (value("policy")) {
      o.policy = value("policy");
    }
    const [log] = files("event_log");
    if (log) {
      const first = new Uint8Array(await log.slice(0, 64).arrayBuffer()).find((b) => b > 0x20);
      if (first === 0x5b || first === 0x22) o.event_log = await one("event_log", text); // [ or "
      else o.event_log_ccel = await one("event_log", base64);
    }
    for (const [id, read, key] of [["collateral", base64, "collateral_files"], ["trust_anchors", text, "trust_anchors"]]) {
      if (files(id).length === 0) continue;
      o[key] = {};
      for (const f of files(id)) {
        if (f.size > MAX_EVIDENCE) throw new Problem("file_too_large", `${f.name} has ${f.size} bytes`, "give the right file; none of its kind is that large");
        o[key][f.name] = await read(f);
      }
    }
    return o;
  }

  // obtain returns evidence, and completes the options with how it was asked for.
  async function obtain(o) {
    if (source() === "url") {
      if (!value("url")) throw new Problem("evidence_url", "no address is given", "give that of the instance, or a report");
      const url = endpoint(value("url"));
      o.nonce ??= hex(crypto.getRandomValues(new Uint8Array(32)));
      o.asked = true;
      say(`Asking ${url.host} with nonce ${o.nonce.slice(0, 16)}…`);
      return { bytes: await ask(url, o.nonce), from: url.href, nonce: o.nonce };
    }
    if (value("kind")) o.kind = value("kind");
    const [file] = files("report-file");
    if (file) {
      if (file.size > MAX_EVIDENCE) throw new Problem("evidence_too_large", `${file.name} has ${file.size} bytes, more than ${MAX_EVIDENCE}`);
      return { bytes: new Uint8Array(await file.arrayBuffer()), from: file.name };
    }
    if (!value("report")) throw new Problem("evidence_malformed", "no report is given", "paste one, or choose a file");
    return { bytes: new TextEncoder().encode($("report").value), from: "the pasted text" };
  }

  // ---- showing ----

  const say = (message) => { $("status").textContent = printable(message); };
  const source = () => document.querySelector("input[name=source]:checked").value;

  // Flags that fixes name, and the fields that stand for them here.
  const fields = {
    "--compose-hash": "compose_hash", "--compose": "manifest", "--app-id": "app_id", "--instance-id": "instance_id", "--os-image-hash": "os_image_hash",
    "--lock": "lock", "--policy": "policy", "--collateral": "collateral", "--dev-roots": "dev_roots", "--trust-anchor": "trust_anchors",
    "--event-log": "event_log", "--gpu-evidence": "gpu_evidence", "--at": "at", "--nonce": "nonce", "--report-data": "report_data", "--tee": "kind",
  };

  // fix shows a remedy, with a way to each field that it names.
  function fix(words) {
    const p = el("p", { class: "fix" }, el("strong", {}, "Fix: "), words);
    for (const flag of new Set(words.match(/--[a-z-]+/g) ?? [])) {
      const field = $(fields[flag] ?? "");
      if (!field) continue;
      const go = el("button", { type: "button", class: "link" }, `${flag} is the field “${document.querySelector(`label[for=${field.id}]`).textContent}”`);
      go.addEventListener("click", () => {
        if (flag === "--tee") choose("report");
        field.closest("details")?.setAttribute("open", "");
        field.focus();
      });
      p.append(" ", go);
    }
    return p;
  }

  const facts = (rows) => el("dl", { class: "facts" }, rows.filter(([, v]) => v !== undefined && v !== null && v !== "")
    .map(([k, v, cls]) => [el("dt", {}, k), el("dd", cls ? { class: cls } : {}, v)]));

  const section = (title, ...children) => el("section", { class: "card" }, el("h3", {}, title), ...children);
  const folded = (title, ...children) => el("details", { class: "card" }, el("summary", {}, title), ...children);

  const freshness = {
    nonce: "answers the nonce of this question",
    report_data: "carries the report data that you expect",
    none: "unknown: the evidence may be old",
  };
  const trusts = {
    production: "production: roots of the hardware's vendor",
    development: "development: proves nothing about hardware",
    caller: "caller: keys that you vouch for",
  };

  // outcome is the verdict in a word, a sentence and a kind that the style colours.
  function outcome(v) {
    const errors = v.findings.filter((f) => f.level === "error").length;
    if (v.undecided) return ["undecided", "Undecided", v.reason || "something is missing to decide"];
    if (!v.accepted) return ["refused", "Refused", errors === 1 ? "One finding speaks against it." : `${errors} findings speak against it.`];
    if (v.scope === "signature") return ["limited", "Signature holds", "Signature, certificate chain and collateral were judged, and nothing else. What runs was not."];
    if (v.trust === "development") return ["limited", "Accepted, for development only", "The evidence is of the workload that you expect, under development roots. It proves nothing about hardware."];
    if (v.trust === "caller") return ["accepted", "Accepted", "The evidence is of the workload that you expect, on a platform whose key you vouch for."];
    return ["accepted", "Accepted", "The evidence is of the workload that you expect, and the hardware's vendor vouches for it."];
  }

  function headline(kind, word, sentence) {
    const h = el("h2", { tabindex: "-1" }, word);
    const head = el("div", { class: `outcome ${kind}` }, el("span", { class: "sign", "aria-hidden": "true" }), el("div", {}, h, el("p", {}, sentence)));
    return [head, h];
  }

  function show(kind, word, sentence, parts, data) {
    const result = $("result");
    const [head, h] = headline(kind, word, sentence);
    result.replaceChildren(head, ...parts.filter(Boolean));
    result.dataset.outcome = data;
    result.hidden = false;
    h.focus({ preventScroll: true });
    result.scrollIntoView({ block: "start" });
  }

  function showProblem(p) {
    show("refused", "Not verified", p.message, [el("section", { class: "card" }, el("p", {}, el("code", {}, p.code)), p.fix ? fix(p.fix) : null)], "error");
    $("result").dataset.code = p.code;
  }

  const anchors = (list, none) => list.length === 0 ? el("p", { class: "help" }, none)
    : el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "What"), el("th", { scope: "col" }, "Value"), el("th", { scope: "col" }, "Whose word"))),
      el("tbody", {}, list.map((a) => el("tr", {}, el("td", {}, a.what), el("td", { class: "hex" }, a.value), el("td", {}, a.origin)))));

  function findings(list) {
    const order = { error: 0, warning: 1, info: 2 };
    if (list.length === 0) return el("p", { class: "help" }, "None.");
    return el("ul", { class: "findings" }, [...list].sort((a, b) => order[a.level] - order[b.level]).map((f) =>
      el("li", { class: f.level in order ? f.level : "error" },
        el("p", {}, el("span", { class: "level" }, f.level), " ", el("code", {}, f.code), f.evidence ? el("span", { class: "where" }, ` in ${f.evidence}`) : ""),
        el("p", {}, f.message), f.code === "channel_unbound" ? fix("verify with the command, outside of a browser; see below") : f.fix ? fix(f.fix) : null)));
  }

  function connection(v, evidence) {
    const key = v.workload?.channel_key;
    const asked = source() === "url" ? evidence.from : "";
    return section("The connection, which this page cannot see",
      el("p", {}, "A browser tells no page the key of the connection that an answer came over. So this verdict is about the machine that signed the evidence, and not about what your browser is connected to."),
      key ? el("p", {}, "The instance vouches for the TLS key below, given as the SHA-256 of its public key. Open the instance in a tab and compare the public key's fingerprint in the certificate viewer, or let the command compare:") : null,
      key ? el("p", { class: "hex" }, key) : null,
      asked.startsWith("https:") ? el("p", { class: "hex" }, `dstack verify ${new URL(asked).origin}`) : null);
  }

  function download(name, type, bytes, label) {
    const b = el("button", { type: "button", class: "second" }, label);
    b.addEventListener("click", () => {
      const url = URL.createObjectURL(new Blob([bytes], { type }));
      const a = el("a", { href: url, download: name });
      a.click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
    return b;
  }

  function showVerdict(v, evidence, options, answer, milliseconds) {
    const [kind, word, sentence] = outcome(v);
    const w = v.workload, p = v.platform;
    const flat = Object.entries(v.claims ?? {}).flatMap(([k, x]) => x !== null && typeof x === "object" ? Object.entries(x).map(([i, y]) => [`${k}[${i}]`, y]) : [[k, x]]);
    const pretty = JSON.stringify(v, null, 2);
    show(kind, word, sentence, [
      section("Verdict", facts([
        ["Trust", v.signature === "valid" ? trusts[v.trust] ?? v.trust : "none: no root vouches for this evidence", v.trust === "production" ? "" : "warn"],
        ["Scope", v.scope === "signature" ? "signature, chain and collateral only" : "the workload, and where it runs"],
        ["Evidence", evidence.from, "wrap"],
        ["Nonce", evidence.nonce, "hex"],
        ["TEE", v.tee], ["TCB status", v.tcb_status], ["Advisories", v.advisories.join(", ")],
        ["Signatures", v.signature],
        ["Freshness", freshness[v.freshness] ?? v.freshness],
        ["Connection", v.channel === "none" ? "not checked: a browser cannot" : v.channel],
        ["Verified at", `${v.at} (${options.at ? "as you asked" : options.not_before ? "the later of your browser's clock and the clock of this page's server" : "your browser's clock"})`],
        ["Holds until", p?.expires],
        ["Took", `${milliseconds.toFixed(1)} ms`],
      ])),
      section("Findings", findings(v.findings)),
      w ? section("Workload", facts([
        ["App", w.name], ["App id", w.app_id, "hex"], ["Compose hash", w.compose_hash, "hex"], ["Instance id", w.instance_id, "hex"],
        ["OS image hash", w.os_image_hash, "hex"], ["Key provider", w.key_provider, "hex"],
        ["Runs scripts", w.runs_scripts ? "yes" : "no"], ["Public logs", w.public_logs ? "yes" : "no"], ["Vouched for by", w.bound_by],
      ])) : null,
      section("Anchored: somebody other than the guest vouches", anchors(v.anchors, "Nothing.")),
      section("Self-consistent only: the guest's own word", anchors(v.self_consistent, "Nothing.")),
      section("Still trusted", el("ul", {}, v.assumptions.map((a) => el("li", {}, a)),
        el("li", {}, `this page, which ${location.host || location.protocol} served${window.isSecureContext ? "" : " over plain HTTP, so that anybody on the way could have changed it"}, with the verifier of SHA-256 `, el("span", { class: "hex" }, $("page-hash").textContent)),
        el("li", {}, options.at ? "your browser" : "your browser, and the clocks that told the time"))),
      connection(v, evidence),
      p ? folded("Platform", facts([
        ["Root", p.root, "hex"], ["Product", p.product], ["Device id", p.device_id, "hex"], ["Device scheme", p.device_scheme],
        ["Platform status", p.platform_status], ["Module status", p.module_status], ["Quoting enclave status", p.qe_status],
        ["TCB date", p.tcb_date], ["Evaluation number", p.tcb_evaluation], ["Certified TCB", p.certified_tcb && JSON.stringify(p.certified_tcb)],
        ["Debug", p.debug ? "yes: the host reads the memory" : "no"], ["Signed at", p.made],
        ["Bound by hardware", p.bound.join(", ")], ["Not bound", p.not_bound.join(", ")], ["Not checked", p.unchecked.join(", ")],
      ])) : null,
      flat.length ? folded("Values that the hardware signed", el("table", { class: "registers" }, el("tbody", {}, flat.map(([k, x]) => el("tr", {}, el("th", { scope: "row" }, k), el("td", { class: "hex" }, x)))))) : null,
      folded("Verdict as JSON", el("pre", { tabindex: "0" }, ...pretty.split("\n").flatMap((line) => [printable(line), document.createTextNode("\n")]))),
      el("div", { class: "actions" },
        download("dstack-verdict.json", "application/json", answer, "Download verdict"),
        download("dstack-evidence.bin", "application/octet-stream", evidence.bytes, "Download evidence")),
    ], v.undecided ? "undecided" : v.accepted ? "accepted" : "refused");
    $("result").dataset.code = "";
  }

  // ---- events ----

  function choose(kind) {
    document.querySelector(`input[name=source][value=${kind}]`).checked = true;
    $("from-url").hidden = kind !== "url";
    $("from-report").hidden = kind !== "report";
  }
  for (const radio of document.querySelectorAll("input[name=source]")) radio.addEventListener("change", () => choose(source()));

  const stop = (e) => { e.preventDefault(); $("drop").classList.toggle("over", e.type === "dragover"); };
  for (const type of ["dragover", "dragleave", "drop"]) addEventListener(type, stop);
  addEventListener("drop", (e) => {
    if (e.dataTransfer.files.length === 0) return;
    choose("report");
    $("report-file").files = e.dataTransfer.files;
  });
  $("policy-file").addEventListener("change", () => { $("policy").value = "file"; });

  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $("verify");
    if (button.disabled) return;
    button.disabled = true;
    $("result").hidden = true;
    delete $("result").dataset.outcome;
    try {
      const options = await readOptions();
      const evidence = await obtain(options);
      if (notBefore) options.not_before = notBefore();
      say("Verifying…");
      const { answer, milliseconds } = await judge(evidence.bytes, JSON.stringify(options));
      const v = JSON.parse(answer);
      if (typeof v.error === "string") throw new Problem(v.code, v.error, v.fix);
      showVerdict(v, evidence, options, answer, milliseconds);
      say("Done.");
    } catch (err) {
      showProblem(err instanceof Problem ? err : new Problem("internal", `this page failed: ${err}`, "please report it"));
      say("Not verified.");
    } finally {
      button.disabled = false;
    }
  });

  $("page-origin").textContent = location.protocol === "file:" ? "a file" : location.origin;
  choose(source());
  const ready = load();
  ready.then(() => say("Ready."), (err) => {
    say("The verifier is not there.");
    $("page-hash").textContent = $("page-version").textContent = "not loaded";
    showProblem(err instanceof Problem ? err : new Problem("verifier_failed", String(err)));
  });
})();
